"""The second tiny model, in VideoCrafter2's form: a U-Net that predicts eps in windows of 16
frames, an image VAE frame by frame, CLIP's text encoder.
`python -m extras.tiny.train --model unet` trains it."""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from extras.models.tiny import use_rows
from extras.models.videocrafter2 import SCHEDULER, signal_scale
from extras.tiny.fit import (
    TOKENS,
    ahead,
    clips,
    fit,
    make_tokenizer,
    mixed_precision,
    omit_words,
    weighed,
    weighed_square,
)
from extras.tiny.world import FRAMES, SIZE, caption

WINDOW = slice(1, FRAMES, 3)  # 16 frames, evenly spaced over a clip of the world
BATCH = 128  # frames per step of the U-Net


def make_vae() -> AutoencoderKL:
    """8x in space, 4 channels: a frame of 64x64 becomes a latent of 4 x 8 x 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,  # measured after training
    )


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=None,
            eos_token_id=1,  # as in `make_tokenizer`
            pad_token_id=0,
        )
    )


def make_unet() -> UNet3DConditionModel:
    """Two levels, cross-attention in the lower one. At first eps is the input, divided by its
    spread in each frame.

    This is nearly right at high noise. One half of it passes through the first skip connection, the
    other half is its negative, since SiLU(x) - SiLU(-x) = x and since a group of both keeps its
    mean through the last GroupNorm.
    """
    unet = UNet3DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    eye = torch.eye(4)
    pair = torch.cat([eye, -eye])  # 8 x 4
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut.weight.data  # 64 x (64 from below + 64 of conv_in)
    with torch.no_grad():
        unet.conv_in.weight[:8] = 0
        unet.conv_in.weight[:8, :, 1, 1] = pair
        unet.conv_in.bias[:8] = 0
        shortcut[:8] = 0
        shortcut[:8, 64:72, 0, 0] = torch.eye(8)
        unet.conv_out.weight.mul_(0.1)
        unet.conv_out.weight[:, :8] = 0
        unet.conv_out.weight[:, :8, 1, 1] = pair.T
    return unet.eval()  # without dropout, because a model this small is far from memorising


@functools.cache
def levels(device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of the release's 1000 timesteps, with its signal scale."""
    cumulated = DDIMScheduler(**SCHEDULER).alphas_cumprod
    scale = torch.tensor([signal_scale(t) for t in range(1000)])
    return (scale * cumulated.sqrt()).to(device), (1 - cumulated).sqrt().to(device)


def train_vae(vae: AutoencoderKL, steps: int, work: Path) -> None:
    """Train on single frames. The object's pixels weigh more because they are few."""

    def batch_at(step):
        video, mask = (x[:, :, 0] for x in clips(32, 1, seed=step)[1:])
        return video, mask, torch.tensor(0.02 * min(1, 2 * step / steps))

    def loss_of(video, mask, kl_weight):
        with mixed_precision(vae.device):
            posterior = vae.encode(video).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().sum() / posterior.mean.numel()
        return weighed(decoded - video, mask) + kl_weight * kl

    fit("vae", [vae], batch_at, loss_of, steps, 2e-3, work, ema=0.995)


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, n: int, work: Path) -> tuple[torch.Tensor, ...]:
    """n clips as latents (n, 16, 4, 8, 8), scaled to unit variance, their stories (n, 4), and the
    object's cells (n, 16, 1, 8, 8); cached in a file."""

    def eight_clips(seed):
        story, video, mask = clips(8, FRAMES, seed=10**6 + seed)
        cells = F.max_pool3d(mask[:, :, WINDOW], (1, 8, 8)).transpose(1, 2)
        return story, video[:, :, WINDOW].transpose(1, 2).flatten(0, 1), cells.half()

    path = work / "latents.pt"
    if not path.exists():
        latents, stories, masks = [], [], []
        batches = ahead(eight_clips, range(n // 8), vae.device)
        for story, frames, cells in tqdm(batches, desc="latents", mininterval=10):
            with mixed_precision(vae.device):
                latent = vae.encode(frames.to(vae.device)).latent_dist.mode().cpu().unflatten(0, (8, -1))
            latents.append(latent.half()), stories.append(story), masks.append(cells)
        torch.save([torch.cat(x) for x in (latents, stories, masks)], path)
    latents, stories, masks = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 4))
    return latents.float() * vae.config.scaling_factor, stories, masks.float()


def token_ids(tokenizer, words: list[str]) -> torch.Tensor:
    """n texts as n x TOKENS."""
    return tokenizer(words, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids


def error_of_eps(models: tuple, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, ids: torch.Tensor):
    """Error of the predicted eps, divided by alpha: this weighs it like an error of v. Unweighed,
    what eps says about x0 at high noise would hardly count. models: U-Net, text encoder.
    x0, eps: (n, F, 4, 8, 8); t: n timesteps; ids: (n, TOKENS). Returns the error in eps's shape."""
    unet, text_encoder, *_ = models
    alpha, sigma = (level[t].view(-1, 1, 1, 1, 1) for level in levels(unet.device))
    with mixed_precision(unet.device), sdpa_kernel(SDPBackend.MATH):  # faster for 16 frames or cells
        text = text_encoder(ids).last_hidden_state
        guess = unet((alpha * x0 + sigma * eps).transpose(1, 2), t, text).sample.transpose(1, 2).float()
    return (guess - eps) / alpha


def same_story(story: torch.Tensor) -> list[str]:
    """The captions of a story (4) with each of the five actions."""
    return [caption([*story[:3], action]) for action in range(5)]


def words_alike(text_encoder: CLIPTextModel, ids: torch.Tensor) -> torch.Tensor:
    """Similarity of `same_story`'s texts, given as tokens (5, TOKENS): 0 if all are at least 15
    apart, about half their norm.

    Until the U-Net tells the first frame from the last, the error of eps is the same for "left" and
    "right", and the text encoder would merge them into one word.
    """
    texts = text_encoder(ids).last_hidden_state.flatten(1)
    return F.relu(1 - torch.pdist(texts) / 15).mean()


def train_unet(models: tuple, data: tuple[torch.Tensor, ...], steps: int, lr: float, work: Path) -> None:
    """First pictures, then actions (45 % of the steps). models: U-Net, text encoder, tokenizer.

    Pictures: single frames, then runs of 4 frames, then clips; the last third samples more low
    noise. The model then draws clean clips that move, but not as the prompt says.
    Actions: 3 frames from all over a clip, then 4, 8 and 16. The U-Net knows a frame's position
    only from where its temporal convolutions meet the ends of the clip, and with 3 frames the ends
    are near. "Left" and "right" take longest, so they are sampled most. Most timesteps are at high
    noise, where actions are decided.
    """
    latents, stories, masks = data
    unet, text_encoder, tokenizer = models
    rounds = round(0.55 * steps), round(0.45 * steps)

    def batch(seed, frames, apart, draw_t, weights=(1.0, 1, 1, 1, 1)):
        n, generator = BATCH // frames, torch.Generator().manual_seed(seed)
        span = (frames - 1) * apart + 1
        first = int(torch.randint(17 - span, (), generator=generator))
        pick = torch.multinomial(torch.tensor(weights)[stories[:, 3]], n, replacement=True, generator=generator)
        t = (1000 * draw_t(torch.rand(n, generator=generator))).long().clamp(max=999)
        x0, cells = (x[pick, first : first + span : apart] for x in (latents, masks))
        ids = token_ids(tokenizer, omit_words(stories[pick], generator))
        return x0, torch.randn(x0.shape, generator=generator), t, ids, cells

    def pictures(step):
        done = step / rounds[0]
        frames = 16 if done > 0.3 else 4 if done > 0.15 else 1
        return batch(step, frames, 1, lambda u: u**2 if done > 0.67 else u)

    def actions(step):
        done = step / rounds[1]
        frames, apart = (16, 1) if done > 0.5 else (8, 2) if done > 0.42 else (4, 5) if done > 0.36 else (3, 7)
        high = 0.6 if frames == 16 else 0.85  # share of draws in the uppermost 300 timesteps
        draw_t = lambda u: torch.where(u < high, 1 - 0.3 * u / high, ((u - high) / (1 - high)) ** 2)  # noqa: E731
        weights = (1.0, 1, 1, 1, 1) if frames == 16 else (3.0, 3, 1, 2, 2)
        ids = token_ids(tokenizer, same_story(stories[step % len(stories)]))
        return *batch(10**7 + step, frames, apart, draw_t, weights), ids

    def loss(x0, eps, t, ids, cells, same=None):
        error = weighed_square(error_of_eps(models, x0, eps, t, ids), cells)
        return error if same is None else error + words_alike(text_encoder, same)

    use_rows(unet)
    matrices = [p for name, p in unet.named_parameters() if "block" in name and p.ndim > 1]
    for name, batch_at, count, rate in zip(("pictures", "actions"), (pictures, actions), rounds, (lr, 0.8 * lr)):
        fit(name, [unet, text_encoder], batch_at, loss, count, rate, work, 0.998, matrices)


def train(args) -> None:
    """Train everything and write a folder in diffusers' format. args: those of train.py."""
    vae, unet, text_encoder, tokenizer = make_vae(), make_unet(), make_text_encoder(), make_tokenizer()
    for model in (vae, unet, text_encoder):
        model.to(args.device)
    train_vae(vae, args.vae_steps, args.work)
    data = encode_clips(vae, args.clips, args.work)
    train_unet((unet, text_encoder, tokenizer), data, args.steps, args.lr, args.work)
    for name, model in dict(vae=vae, unet=unet, text_encoder=text_encoder).items():
        model.half().save_pretrained(args.output / name)
    tokenizer.save_pretrained(args.output / "tokenizer")
