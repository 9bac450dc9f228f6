"""What both trainings share: clips, words, two weighed losses, and the training loop."""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader
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
    """n random stories (n, 4), their video (n, 3, frames, SIZE, SIZE) in [-1, 1], and the object's
    mask (0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    stories = sample_stories(n, generator)
    start = int(torch.randint(FRAMES - frames + 1, (), generator=generator))
    return stories, *draw(stories, sample_motion(stories, generator)[:, start : start + frames])


def draw(stories: torch.Tensor, motion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stories (n, 4) and motion (n, T, 3) as a video (n, 3, T, SIZE, SIZE) in [-1, 1], and the
    object's mask."""
    video = render(stories, motion)
    mask = (video - backgrounds()[stories[:, 2]][:, None]).abs().amax(2, keepdim=True) > 0.02
    return video.transpose(1, 2) * 2 - 1, mask.transpose(1, 2).float()


def omit_words(stories: torch.Tensor, generator: torch.Generator) -> list[str]:
    """Captions that omit the colour (30 %), the place (30 %), the subject (10 %) or, for guidance,
    everything (10 %)."""
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
                    state = self.state[p] = self.state[p] or dict(momentum=torch.zeros_like(p))
                    moved.append(p.grad.lerp(state["momentum"].lerp_(p.grad, 0.05), 0.95).flatten(1))
                x = torch.stack(moved)
                x = (x.mT if rows > columns else x) / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    g = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
                x = x * (0.2 * max(rows, columns) ** 0.5 * group["lr"])
                for p, change in zip(params, x.mT if rows > columns else x):
                    p.sub_(change.reshape(p.shape))


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where it is fast."""
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def ahead(make: Callable[[int], Any], indices: Sequence[int], device: torch.device) -> Iterable[Any]:
    """make(i) for each index. For a GPU, other processes make them ahead of time."""
    workers = min(8, os.cpu_count() or 1) if device.type == "cuda" and hasattr(os, "fork") else 0
    context = "fork" if workers else None
    return DataLoader(indices, None, collate_fn=make, num_workers=workers, multiprocessing_context=context)


class Replayed:
    """A function of GPU tensors as CUDA graphs, one for each shape of its input: a training step of
    a tiny model is thousands of kernels, which take longer to launch than to run."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function, self.graphs = function, {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        key = tuple(x.shape for x in inputs)
        if key not in self.graphs:  # the first call runs as it is: it sets up what must not be in the graph
            self.graphs[key] = None
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return output
        if self.graphs[key] is None:
            graph, own = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph):
                output = self.function(*own)
            self.graphs[key] = graph, own, output
        graph, own, output = self.graphs[key]
        for mine, x in zip(own, inputs):
            mine.copy_(x)
        graph.replay()
        return output


def fit(
    name: str,
    modules: list[torch.nn.Module],
    batch_at: Callable[[int], tuple[torch.Tensor, ...]],
    loss_of: Callable[..., torch.Tensor],
    steps: int,
    lr: float,
    work: Path,
    ema: float,
    matrices: Sequence[torch.nn.Parameter] = (),
) -> None:
    """Minimise `loss_of(*batch_at(step))`: Muon for `matrices`, AdamW for the rest, warm-up, cosine
    decay.

    batch_at makes a step's tensors on the CPU; loss_of gets them on the modules' device, where
    nothing in it may wait for a result (see `Replayed`). Leaves the running average of the weights
    in the modules. Saves its state every two minutes and resumes from it.
    """
    params = [p.requires_grad_(True) for m in modules for p in m.parameters()]
    others = [p for p in params if not any(p is q for q in matrices)]
    average = [p.detach().clone() for p in params]
    device, cuda = params[0].device, params[0].is_cuda
    rate, change = torch.zeros((), device=device), torch.zeros((), device=device)  # this step's; change: of the average
    options = dict(betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=cuda)
    optimizers = [torch.optim.AdamW(others, lr=rate, **options)]
    if matrices:
        optimizers.append(Muon(list(matrices), rate))

    path, start, saved = work / f"{name}.pt", 0, time.time()
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        start = state["step"]
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
            optimizer.param_groups[0]["lr"] = rate
        for p, a, value, mean in zip(params, average, state["params"], state["average"]):
            p.data.copy_(value), a.copy_(mean)

    def update(*batch):
        loss = loss_of(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for p, a in zip(params, average):
            a.lerp_(p.detach(), change)
        return loss.detach()

    update = Replayed(update) if cuda else update
    batches = ahead(batch_at, range(start, steps), device)
    bar = tqdm(batches, desc=name, initial=start, total=steps, mininterval=10)
    for step, batch in enumerate(bar, start):
        rate.fill_(lr * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps)))
        change.fill_(1 - min(ema, (step + 1) / (step + 10)))
        loss = update(*(x.to(device) for x in batch))
        if step % 50 == 0:
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
