"""Train the tiny CogVideoX from scratch: renderer -> VAE -> latents -> transformer with its text encoder -> transformer
and decoder again, on clips that they generate -> checkpoint.

    python -m extras.tiny.train                # everything; if interrupted, the same command resumes
    python -m extras.tiny.train --init extras/tiny/checkpoint --lr 1e-3 --steps 2500    # without the VAE

Intermediate results are in extras/tiny/work/ (not in git). The result, a pipeline in diffusers format, is
extras/tiny/checkpoint/.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from extras.tiny.world import (
    FRAMES,
    SIZE,
    Fitter,
    backgrounds,
    caption,
    render,
    sample_motion,
    sample_stories,
    vocabulary,
)

TOKENS = 16  # text tokens per prompt, including end mark and padding
BATCH = 16  # whole clips per step of the transformer
HERE = Path(__file__).parent


def make_vae() -> AutoencoderKLCogVideoX:
    """8x in space, 4x in time, 8 channels: 49 frames of 64x64 become a latent of 13 x 8 x 8 x 8."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=SIZE,
        sample_width=SIZE,
        scaling_factor=1.0,  # measured after training
    )


def make_transformer() -> CogVideoXTransformer3DModel:
    """CogVideoX-2B's architecture (sincos positions) with 6 layers of width 128: 13 x 4 x 4 = 208 tokens per window."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        time_embed_dim=128,
        text_embed_dim=64,
        num_layers=6,
        sample_width=SIZE // 8,
        sample_height=SIZE // 8,
        sample_frames=FRAMES,
        max_text_seq_length=TOKENS,
        spatial_interpolation_scale=1.0,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, lower-cased; `</s>` ends a prompt; every other word is `<unk>`."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def make_text_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )


def make_scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2B's noise schedule."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def clips(n: int, frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n random stories (n, 4), their video (n, 3, frames, SIZE, SIZE) in [-1, 1], and the object's mask (0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    stories = sample_stories(n, generator)
    start = int(torch.randint(FRAMES - frames + 1, (), generator=generator))
    return stories, *draw(stories, sample_motion(stories, generator)[:, start : start + frames])


def draw(stories: torch.Tensor, motion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stories (n, 4) and motion (n, T, 3) as a video (n, 3, T, SIZE, SIZE) in [-1, 1], and the object's mask."""
    video = render(stories, motion)
    mask = (video - backgrounds()[stories[:, 2]][:, None]).abs().amax(2, keepdim=True) > 0.02
    return video.transpose(1, 2) * 2 - 1, mask.transpose(1, 2).float()


def to_cells(mask: torch.Tensor) -> torch.Tensor:
    """The object's mask (n, 1, T, SIZE, SIZE) -> the fraction of video frames in which the object touches a latent cell
    (n, F, 1, 8, 8)."""
    mask = F.max_pool3d(mask, (1, 8, 8))
    return torch.cat([mask[:, :, :1], F.avg_pool3d(mask[:, :, 1:], (4, 1, 1))], 2).transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz iterations: torch.optim.Muon in float32, for processors on which
    bfloat16 is slow."""

    def __init__(self, params: list[torch.Tensor], lr: float):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                tall = p.shape[0] > p.shape[1]
                x = (x.T if tall else x) / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    g = x @ x.T
                    x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
                p.add_(x.T if tall else x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


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
) -> None:
    """Minimise `loss_at(step)`: Muon for the matrices of transformer blocks, AdamW for the rest, warm-up, cosine decay.

    Leaves the running average of the weights in the modules. Saves its state every two minutes and resumes from it.
    """
    params = [p.requires_grad_(True) for m in modules for p in m.parameters()]
    blocks = [m.transformer_blocks for m in modules if hasattr(m, "transformer_blocks")]
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    others = [p for p in params if not any(p is q for q in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon(matrices, lr))
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


def weighed(error: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of |error| + error^2, with eleven times the weight on the object."""
    return ((1 + 10 * mask) * (error.abs() + error**2)).mean()


def train_vae(vae: AutoencoderKLCogVideoX, steps: int, work: Path) -> None:
    """Train on single frames, then on clips of 9 and 17 frames (one and two of the VAE's own pieces).

    The object's pixels weigh more because they are few. The KL term grows until the latents' noise is about 0.15 of
    their spread; with less, the encoder may encode the object so faintly that diffusion never sees it.
    """

    def loss_at(step):
        frames, n = (1, 24) if step < 0.2 * steps else (9, 4) if step < 0.6 * steps else (17, 2)
        _, video, mask = (x.to(vae.device) for x in clips(n, frames, seed=step))
        with mixed_precision(vae.device):
            posterior = vae.encode(video).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().sum() / posterior.mean.numel()
        return weighed(decoded - video, mask) + 0.04 * min(1, 2 * step / steps) * kl

    fit("vae", [vae], loss_at, steps, 2e-3, work, ema=0.995)


@torch.no_grad()
def encode(vae: AutoencoderKLCogVideoX, video: torch.Tensor) -> torch.Tensor:
    """Video (n, 3, 49, SIZE, SIZE) in [-1, 1] -> latents (n, 13, 8, 8, 8), not scaled, on the CPU."""
    with mixed_precision(vae.device):
        return vae.encode(video.to(vae.device)).latent_dist.mode().transpose(1, 2).float().cpu()


def encode_clips(vae: AutoencoderKLCogVideoX, n: int, work: Path) -> tuple[torch.Tensor, ...]:
    """n clips as latents (n, 13, 8, 8, 8), scaled to unit variance, their stories (n, 4), and the object's cells (see
    `to_cells`); cached in a file."""
    path = work / "latents.pt"
    if not path.exists():
        latents, stories, masks = [], [], []
        for seed in tqdm(range(n // 8), desc="latents", mininterval=10):
            story, video, mask = clips(8, FRAMES, seed=10**6 + seed)
            latents.append(encode(vae, video).half()), stories.append(story), masks.append(to_cells(mask).half())
        torch.save({"latents": torch.cat(latents), "stories": torch.cat(stories), "masks": torch.cat(masks)}, path)
    state = torch.load(path, weights_only=True)
    latents = state["latents"].float()
    if vae.config.scaling_factor == 1.0:  # not measured yet
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return latents * vae.config.scaling_factor, state["stories"], state["masks"].float()


def error_of_v(
    models: tuple, x: torch.Tensor, x0: torch.Tensor, stories: torch.Tensor, t: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add noise of timesteps t (n) to x (n, F, 8, 8, 8); return the predicted v minus the one that leads to x0, and
    sigma (n, 1, 1, 1, 1). models: transformer, text encoder, tokenizer, scheduler.

    Captions omit the colour (30 %), the place (30 %), the whole subject (10 %) or everything (10 %, for guidance).
    """
    transformer, text_encoder, tokenizer, scheduler = models
    n, device = len(x), transformer.device
    kept = torch.rand(n, 4, generator=generator) > torch.tensor([0.3, 0.3, 0.1, 0.1])
    words = [caption(story, c, b, s) if k else "" for story, (c, b, s, k) in zip(stories, kept.tolist())]
    ids = tokenizer(words, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    level = scheduler.alphas_cumprod[t].float().view(n, 1, 1, 1, 1)
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    x = alpha * x + sigma * torch.randn(x.shape, generator=generator)
    x, target, sigma, ids, t = (y.to(device) for y in (x, (alpha * x - x0) / sigma, sigma, ids, t))
    with mixed_precision(device):
        v = transformer(x, text_encoder(ids)[0], t, return_dict=False)[0].float()
    return v - target, sigma


def weighed_square(error: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Mean square, with five times the weight on the object, because most of a clip is background."""
    weight = 1 + 4 * cells.to(error.device)
    return (weight * error**2).mean() / weight.mean()


def train_transformer(
    models: tuple, data: tuple[torch.Tensor, ...], steps: int, lr: float, last: bool, work: Path
) -> None:
    """Train by v-prediction: on many first frames, then on short clips, then on whole ones.

    With few video tokens the model learns what the words mean within minutes; with 208 of them it takes hours. The last
    third samples more low noise, where the outlines are drawn. `last`: train as in the last third throughout, for a
    model that knows the words.
    """
    latents, stories, masks = data

    def loss_at(step):
        done = step / steps
        frames, n = (13, BATCH) if last or done > 0.24 else (3, 3 * BATCH) if done > 0.12 else (1, 8 * BATCH)
        generator = torch.Generator().manual_seed(step)
        pick = torch.multinomial(1.0 + (stories[:, 3] == 2), n, replacement=True, generator=generator)  # jumps: twice
        t = (1000 * torch.rand(n, generator=generator) ** (2 if last or done > 0.67 else 1)).long()
        x0 = latents[pick, :frames]
        error, _ = error_of_v(models, x0, x0, stories[pick], t, generator)
        return weighed_square(error, masks[pick, :frames])

    fit("transformer", list(models[:2]), loss_at, steps, lr, work, ema=0.998)


@torch.no_grad()
def own_clips(pipe: CogVideoXPipeline, n: int, work: Path) -> tuple[torch.Tensor, ...]:
    """About n clips generated by the transformer: their latents (m, 13, 8, 8, 8), and for the clean clips that fit them
    best, the latents, stories (m, 4), motions (m, 49, 3) and the object's cells (see `to_cells`).

    Omits clips with another shape, colour or place than the caption's. Cached in a file."""
    path, fitter = work / "own.pt", Fitter()
    kept = torch.load(path, weights_only=True) if path.exists() else []  # for each batch of eight, the correct clips
    pipe.set_progress_bar_config(disable=True)
    for seed in tqdm(range(len(kept), n // 8), desc="own clips", initial=len(kept), total=n // 8):
        generator = torch.Generator().manual_seed(2 * 10**6 + seed)
        told = sample_stories(8, generator)
        options = dict(max_sequence_length=TOKENS, guidance_scale=4.0, num_inference_steps=25, generator=generator)
        with mixed_precision(pipe.device):
            made = pipe([caption(story) for story in told], output_type="latent", **options).frames
            videos = pipe.decode_latents(made).transpose(1, 2).float().cpu() / 2 + 0.5  # n T 3 H W
        kept.append([])
        for x, video, asked in zip(made.float().cpu(), videos, told):
            story, motion = fitter(video)
            if list(story[:3]) == asked[:3].tolist():
                motion = fitter.refine(video, story, motion)
                clean, mask = draw(asked[None], motion[None])
                clean = pipe.vae.config.scaling_factor * encode(pipe.vae, clean)[0]
                kept[-1].append((x.clone(), clean, asked.clone(), motion, to_cells(mask)[0]))
        torch.save(kept, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    if not any(kept):
        raise SystemExit("None of the transformer's clips shows its caption; use more --steps, or --own_clips 0.")
    return tuple(map(torch.stack, zip(*sum(kept, []))))


def tune_transformer(
    models: tuple, data: tuple[torch.Tensor, ...], own: tuple[torch.Tensor, ...], steps: int, work: Path
) -> None:
    """Teach the transformer to predict, at low noise, the clean clips that best fit its own, and so to correct what it
    drew wrong at higher noise. Every second clip is from the world, as before."""
    latents, stories, masks = data
    own_latents, clean, own_stories, _, own_masks = own

    def loss_at(step):
        generator = torch.Generator().manual_seed(4 * 10**6 + step)
        pick, mine = (torch.randint(len(x), (BATCH // 2,), generator=generator) for x in (latents, own_latents))
        u = torch.rand(BATCH, generator=generator)
        t = torch.cat([1000 * u[: BATCH // 2] ** 2, 500 * u[BATCH // 2 :]]).long()
        x, x0 = torch.cat([latents[pick], own_latents[mine]]), torch.cat([latents[pick], clean[mine]])
        error, sigma = error_of_v(models, x, x0, torch.cat([stories[pick], own_stories[mine]]), t, generator)
        error[BATCH // 2 :] *= sigma[BATCH // 2 :]  # error of x0, because v's diverges as the noise vanishes
        return weighed_square(error, torch.cat([masks[pick], own_masks[mine]]))

    fit("mending", list(models[:2]), loss_at, steps, 1e-3, work, ema=0.995)


def tune_decoder(vae: AutoencoderKLCogVideoX, own: tuple[torch.Tensor, ...], steps: int, work: Path) -> None:
    """Teach the decoder the transformer's latents, which differ slightly from the encoder's: it learns to draw the
    clean picture that best fits them. Every second clip is from the world, so it stays the encoder's inverse."""
    (latents, _, stories, motions, _), device = own, vae.device

    def loss_at(step):
        frames = (17, 25)[step % 2]
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (1,), generator=generator)
        _, video, mask = clips(1, frames, seed=3 * 10**6 + step)
        pair = (torch.cat(x).to(device) for x in zip((video, mask), draw(stories[pick], motions[pick, :frames])))
        with torch.no_grad(), mixed_precision(device):
            world = vae.encode(video.to(device)).latent_dist.sample().float()
        mine = latents[pick, : (frames - 1) // 4 + 1].to(device).transpose(1, 2) / vae.config.scaling_factor
        target, mask = pair
        with mixed_precision(device):
            decoded = vae.decode(torch.cat([world, mine])).sample.float()
        return weighed(decoded - target, mask)

    fit("decoder", [vae.decoder], loss_at, steps, 1e-3, work, ema=0.995)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, help="a checkpoint's folder: keep its VAE, train its transformer further")
    parser.add_argument("--vae_steps", type=int, default=3500)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=9000, help="for the transformer")
    parser.add_argument("--own_clips", type=int, default=1024, help="to tune both on; 0: no tuning")
    parser.add_argument("--own_steps", type=int, default=2000, help="to tune the transformer")
    parser.add_argument("--decoder_steps", type=int, default=2000, help="to tune the decoder")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="for the transformer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--output", type=Path, default=HERE / "checkpoint")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    tokenizer, scheduler = make_tokenizer(), make_scheduler()
    if args.init:
        pipe = CogVideoXPipeline.from_pretrained(args.init, torch_dtype=torch.float32)
        vae, transformer, text_encoder = pipe.vae, pipe.transformer, pipe.text_encoder
        vae.eval().requires_grad_(False)
    else:
        vae, transformer, text_encoder = make_vae(), make_transformer(), make_text_encoder()
    vae, transformer, text_encoder = (m.to(args.device) for m in (vae, transformer, text_encoder))
    if not args.init:
        train_vae(vae, args.vae_steps, args.work)
    data = encode_clips(vae, args.clips, args.work)
    models = transformer, text_encoder, tokenizer, scheduler
    train_transformer(models, data, args.steps, args.lr, bool(args.init), args.work)
    pipe = CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    if args.own_clips:
        own = own_clips(pipe, args.own_clips, args.work)
        tune_transformer(models, data, own, args.own_steps, args.work)
        tune_decoder(vae, own, args.decoder_steps, args.work)
    vae.half(), transformer.half()  # on disk; diffusers loads them as float32 unless told otherwise
    pipe.save_pretrained(args.output)


if __name__ == "__main__":
    main()
