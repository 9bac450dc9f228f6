"""Train a tiny model from scratch: the VAE, the network with its text encoder, then network and
decoder again, on clips that they generate.

    python -m extras.tiny.train                 # CogVideoX; if interrupted, the command resumes
    python -m extras.tiny.train --model unet    # VideoCrafter2, without own clips
    python -m extras.tiny.train --init extras/tiny/checkpoint --lr 1e-3 --steps 2500
                                                # CogVideoX, from an earlier VAE and transformer

Intermediate results are in extras/tiny/work/ (not in git). The result, a pipeline in diffusers
format, is extras/tiny/checkpoint/ or extras/tiny/checkpoint-unet/.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from extras.tiny import unet
from extras.tiny.fit import (
    TOKENS,
    clips,
    draw,
    fit,
    make_tokenizer,
    mixed_precision,
    omit_words,
    weighed,
    weighed_square,
)
from extras.tiny.world import FRAMES, SIZE, Fitter, caption, sample_stories

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
    """CogVideoX-2B's architecture (sincos positions) with 6 layers of width 128: 208 tokens per
    window, 13 x 4 x 4."""
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


def to_cells(mask: torch.Tensor) -> torch.Tensor:
    """The object's mask (n, 1, T, SIZE, SIZE) -> the fraction of video frames in which the object
    touches a latent cell (n, F, 1, 8, 8)."""
    mask = F.max_pool3d(mask, (1, 8, 8))
    return torch.cat([mask[:, :, :1], F.avg_pool3d(mask[:, :, 1:], (4, 1, 1))], 2).transpose(1, 2)


def train_vae(vae: AutoencoderKLCogVideoX, steps: int, work: Path) -> None:
    """Train on single frames, then on clips of 9 and 17 frames (one and two pieces of the VAE).

    The object's pixels weigh more because they are few. The KL term grows until the latents' noise
    is about 0.15 of their spread; with less, the encoder may encode the object so faintly that
    diffusion never sees it.
    """

    def batch_at(step):
        frames, n = (1, 24) if step < 0.2 * steps else (9, 4) if step < 0.6 * steps else (17, 2)
        return *clips(n, frames, seed=step)[1:], torch.tensor(0.04 * min(1, 2 * step / steps))

    def loss_of(video, mask, kl_weight):
        with mixed_precision(vae.device):
            posterior = vae.encode(video).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().sum() / posterior.mean.numel()
        return weighed(decoded - video, mask) + kl_weight * kl

    fit("vae", [vae], batch_at, loss_of, steps, 2e-3, work, ema=0.995)


@torch.no_grad()
def encode(vae: AutoencoderKLCogVideoX, video: torch.Tensor) -> torch.Tensor:
    """Video (n, 3, 49, SIZE, SIZE) in [-1, 1] -> latents (n, 13, 8, 8, 8), unscaled, on the CPU."""
    with mixed_precision(vae.device):
        return vae.encode(video.to(vae.device)).latent_dist.mode().transpose(1, 2).float().cpu()


def encode_clips(vae: AutoencoderKLCogVideoX, n: int, work: Path) -> tuple[torch.Tensor, ...]:
    """n clips as latents (n, 13, 8, 8, 8), scaled to unit variance, their stories (n, 4), and the
    object's cells (see `to_cells`); cached in a file."""
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


def noised(
    models: tuple, x: torch.Tensor, x0: torch.Tensor, stories: torch.Tensor, t: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Add noise of timesteps t (n) to x (n, F, 8, 8, 8). Returns it, the v that leads to x0, sigma
    (n, 1, 1, 1, 1), the captions' tokens (n, TOKENS), and t. models: transformer, text encoder,
    tokenizer, scheduler."""
    *_, tokenizer, scheduler = models
    words = omit_words(stories, generator)
    ids = tokenizer(words, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    level = scheduler.alphas_cumprod[t].float().view(len(x), 1, 1, 1, 1)
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    x = alpha * x + sigma * torch.randn(x.shape, generator=generator)
    return x, (alpha * x - x0) / sigma, sigma, ids, t


def predicted_v(models: tuple, x: torch.Tensor, ids: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    transformer, text_encoder, *_ = models
    with mixed_precision(transformer.device):
        return transformer(x, text_encoder(ids)[0], t, return_dict=False)[0].float()


def matrices(transformer: CogVideoXTransformer3DModel) -> list[torch.nn.Parameter]:
    return [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2]


def train_transformer(
    models: tuple, data: tuple[torch.Tensor, ...], steps: int, lr: float, last: bool, work: Path
) -> None:
    """Train by v-prediction: on many first frames, then on short clips, then on whole ones.

    With few video tokens the model learns what the words mean within minutes; with 208 of them it
    takes hours. The last third samples more low noise, where the outlines are drawn. `last`: train
    as in the last third throughout, for a model that already knows the words.
    """
    latents, stories, masks = data

    def batch_at(step):
        done = step / steps
        frames, n = (13, BATCH) if last or done > 0.24 else (3, 3 * BATCH) if done > 0.12 else (1, 8 * BATCH)
        generator = torch.Generator().manual_seed(step)
        pick = torch.multinomial(1.0 + (stories[:, 3] == 2), n, replacement=True, generator=generator)  # jumps: twice
        t = (1000 * torch.rand(n, generator=generator) ** (2 if last or done > 0.67 else 1)).long()
        x0 = latents[pick, :frames]
        return *noised(models, x0, x0, stories[pick], t, generator), masks[pick, :frames]

    def loss_of(x, v, sigma, ids, t, cells):
        return weighed_square(predicted_v(models, x, ids, t) - v, cells)

    fit("transformer", list(models[:2]), batch_at, loss_of, steps, lr, work, 0.998, matrices(models[0]))


@torch.no_grad()
def own_clips(pipe: CogVideoXPipeline, n: int, work: Path) -> tuple[torch.Tensor, ...]:
    """About n clips generated by the transformer: their latents (m, 13, 8, 8, 8), and for the clean
    clips that fit them best, the latents, stories (m, 4), motions (m, 49, 3) and the object's cells
    (see `to_cells`).

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
    """Teach the transformer to predict, at low noise, the clean clips that best fit its own. So it
    learns to correct what it drew wrong at higher noise. Half of each batch is the world's."""
    latents, stories, masks = data
    own_latents, clean, own_stories, _, own_masks = own

    def batch_at(step):
        generator = torch.Generator().manual_seed(4 * 10**6 + step)
        pick, mine = (torch.randint(len(x), (BATCH // 2,), generator=generator) for x in (latents, own_latents))
        u = torch.rand(BATCH, generator=generator)
        t = torch.cat([1000 * u[: BATCH // 2] ** 2, 500 * u[BATCH // 2 :]]).long()
        x, x0 = torch.cat([latents[pick], own_latents[mine]]), torch.cat([latents[pick], clean[mine]])
        told = torch.cat([stories[pick], own_stories[mine]])
        return *noised(models, x, x0, told, t, generator), torch.cat([masks[pick], own_masks[mine]])

    def loss_of(x, v, sigma, ids, t, cells):
        error = predicted_v(models, x, ids, t) - v
        own = sigma[BATCH // 2 :] * error[BATCH // 2 :]  # error of x0, because v's diverges as the noise vanishes
        return weighed_square(torch.cat([error[: BATCH // 2], own]), cells)

    fit("mending", list(models[:2]), batch_at, loss_of, steps, 1e-3, work, 0.995, matrices(models[0]))


def tune_decoder(vae: AutoencoderKLCogVideoX, own: tuple[torch.Tensor, ...], steps: int, work: Path) -> None:
    """Teach the decoder to draw the clean picture that best fits the transformer's latents, which
    differ slightly from the encoder's. Half of each batch is the world's, so that it remains the
    encoder's inverse."""
    latents, _, stories, motions, _ = own

    def batch_at(step):
        frames = (17, 25)[step % 2]
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (1,), generator=generator)
        _, video, mask = clips(1, frames, seed=3 * 10**6 + step)
        target, both = (torch.cat(x) for x in zip((video, mask), draw(stories[pick], motions[pick, :frames])))
        return latents[pick, : (frames - 1) // 4 + 1].transpose(1, 2) / vae.config.scaling_factor, target, both

    def loss_of(mine, target, mask):
        with mixed_precision(vae.device):
            with torch.no_grad():
                world = vae.encode(target[:1]).latent_dist.sample().float()
            decoded = vae.decode(torch.cat([world, mine])).sample.float()
        return weighed(decoded - target, mask)

    fit("decoder", [vae.decoder], batch_at, loss_of, steps, 1e-3, work, ema=0.995)


DEFAULTS = {
    "cogvideox": dict(vae_steps=3500, steps=9000, output=HERE / "checkpoint", work=HERE / "work"),
    "unet": dict(vae_steps=3000, steps=8000, output=HERE / "checkpoint-unet", work=HERE / "work" / "unet"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(DEFAULTS), default="cogvideox")
    parser.add_argument("--init", type=Path, help="a checkpoint's folder: keep its VAE, train its transformer further")
    parser.add_argument("--vae_steps", type=int)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--steps", type=int, help="for the network")
    parser.add_argument("--own_clips", type=int, default=1024, help="to tune both on; 0: no tuning")
    parser.add_argument("--own_steps", type=int, default=2000, help="to tune the transformer")
    parser.add_argument("--decoder_steps", type=int, default=2000, help="to tune the decoder")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="for the network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path)
    parser.set_defaults(**DEFAULTS[parser.parse_known_args()[0].model])
    args = parser.parse_args()
    if args.init and args.model == "unet":
        parser.error("--init continues a CogVideoX only.")
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    if args.model == "unet":
        return unet.train(args)
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
