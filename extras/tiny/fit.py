"""What both trainings share: clips, words, two weighed losses, one training loop."""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from extras.tiny.world import FRAMES, backgrounds, caption, render, sample_motion, sample_stories, vocabulary

TOKENS = 16  # text tokens per prompt, including end mark and padding


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, lower-cased; `</s>` ends a prompt; others are `<unk>`."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def clips(n: int, frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n random stories (n, 4), their video (n, 3, frames, SIZE, SIZE) in [-1, 1],
    and the object's mask (0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    stories = sample_stories(n, generator)
    start = int(torch.randint(FRAMES - frames + 1, (), generator=generator))
    return stories, *draw(stories, sample_motion(stories, generator)[:, start : start + frames])


def draw(stories: torch.Tensor, motion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stories (n, 4) and motion (n, T, 3) as a video (n, 3, T, SIZE, SIZE) in
    [-1, 1], and the object's mask."""
    video = render(stories, motion)
    mask = (video - backgrounds()[stories[:, 2]][:, None]).abs().amax(2, keepdim=True) > 0.02
    return video.transpose(1, 2) * 2 - 1, mask.transpose(1, 2).float()


def omit_words(stories: torch.Tensor, generator: torch.Generator) -> list[str]:
    """Captions that omit the colour (30 %), the place (30 %), the subject (10 %) or
    everything (10 %, for guidance)."""
    kept = torch.rand(len(stories), 4, generator=generator) > torch.tensor([0.3, 0.3, 0.1, 0.1])
    return [caption(story, c, b, s) if k else "" for story, (c, b, s, k) in zip(stories, kept.tolist())]


def weighed(error: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of |error| + error^2, with eleven times the weight on the object."""
    return ((1 + 10 * mask) * (error.abs() + error**2)).mean()


def weighed_square(error: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Mean square, with five times the weight on the object: most of a clip is background."""
    weight = 1 + 4 * cells.to(error.device)
    return (weight * error**2).mean() / weight.mean()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz iterations: torch.optim.Muon in float32, for
    processors on which bfloat16 is slow. Matrices of one shape are orthogonalised together."""

    def __init__(self, params: list[torch.Tensor], lr: float):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                alike[p.flatten(1).shape].append(p)  # a convolution's kernel: a row per output channel
            for (rows, columns), params in alike.items():
                moved = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                    moved.append(p.grad.lerp(momentum, 0.95).flatten(1))
                x = torch.stack(moved)
                x = (x.mT if rows > columns else x) / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    g = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
                for p, change in zip(params, x.mT if rows > columns else x):
                    p.add_(change.reshape(p.shape), alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where it is fast."""
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def fit(
    name: str,
    modules: list[torch.nn.Module],
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    work: Path,
    ema: float,
    matrices: Sequence[torch.nn.Parameter] = (),
) -> None:
    """Minimise `loss_at(step)`: Muon for `matrices`, AdamW for the rest, warm-up, cosine decay.

    Leaves the running average of the weights in the modules. Saves its state
    every two minutes and resumes from it.
    """
    params = [p.requires_grad_(True) for m in modules for p in m.parameters()]
    others = [p for p in params if not any(p is q for q in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon(list(matrices), lr))
    average = [p.detach().clone() for p in params]

    path, start, saved = work / f"{name}.pt", 0, time.time()
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        for p, a, value, mean in zip(params, average, state["params"], state["average"]):
            p.data.copy_(value), a.copy_(mean)

    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=10)
    for step in bar:
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
            optimizer.step()
            optimizer.zero_grad()
        keep = min(ema, (step + 1) / (step + 10))
        for p, a in zip(params, average):
            a.lerp_(p.detach(), 1 - keep)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if time.time() - saved > 120 or step == steps - 1:
            state = dict(step=step + 1, params=[p.detach() for p in params], average=average)
            torch.save(state | dict(optimizers=[o.state_dict() for o in optimizers]), path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
            saved = time.time()
    for p, a in zip(params, average):
        p.data.copy_(a)
    for m in modules:
        m.eval().requires_grad_(False)
