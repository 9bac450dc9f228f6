"""A baseline, on VideoCrafter2: "Video-Infinity: Distributed Long Video Generation" (arXiv
2406.16260).

The F frames of a video are cut into N clips of f frames that do not overlap. Each clip has its own
prompt and is denoised as if it were alone, except that the U-Net's temporal layers also see frames
of other clips:

    convolutions   the 4 frames on either side of the clip
    attention      near(a): frame a and the p frames on either side of it
                   G: g frames spread over the whole video
                   logit(a, j) = q_a k_j / sqrt(d) + (b if t <  T else 0)      j in near(a)
                   logit(a, j) = q_a k_j / sqrt(d) + (b if t >= T else 0)      j in G
                   one softmax over both sets; a frame in both has two keys

So all frames agree on one layout at noisy timesteps, and on details with their neighbours later.
Beyond the video's ends everything is zero, keys and values too; the zero keys count in the softmax.

Written from a description of the authors' code (github.com/Yuanshi9815/Video-Infinity, acfcd17),
which gives each clip a GPU. Here the clips are the batch, in one process or split among several;
the network's output is the same. [ours] Sampling as for all methods here: DDIM, 50 steps, fps 28
(authors: SDE-DPM-Solver++, 30 steps, fps 24, no signal scale).

Memory grows with N, since all clips go through the network together. Predicted, not measured: at
320 x 512 in half precision with guidance, below 13 GB for 64 frames and below 33 GB for 192.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import syncos as S
from extras.baselines import Plan
from extras.models.videocrafter2 import VideoCrafter2
from extras.processes import rank_and_world, together
from prompts import assign_events, event_spans

REACH = 4  # frames on either side that the four convolutions of a TemporalConvLayer see


@dataclass(frozen=True)
class VideoInfinity:
    """The settings, and the method as `extras.baselines.Method` has it."""

    near: int = 8  # p
    shared: int = 16  # g; the authors advise p + g <= 24
    bias: float = 10.0  # b; e^10 = 22026, so one of the two sets decides almost alone
    t_layout: float | None = None  # T; None: 800, with several prompts 850 [authors' examples]
    whole: bool = False  # convolutions and norms on the whole video [paper], not on a clip [authors' code]

    options: ClassVar = ()  # one batch of clips, whatever they are

    def check(self, plan: Plan) -> None:
        F, f, (_, world) = plan.recipe.latent_frames, plan.recipe.window, rank_and_world()
        N, least = F // f, max(self.near, REACH)
        if not issubclass(plan.recipe.backbone, VideoCrafter2):
            raise ValueError(
                "video-infinity needs temporal layers apart from the spatial ones, which only videocrafter2 and "
                "tiny-unet have."
            )
        if F % f:
            raise ValueError(
                f"video-infinity needs whole clips of {f} frames: --num_frames {N * f} or {(N + 1) * f}, not {F}."
            )
        if len(plan.texts) > N:  # [ours] the authors leave events out without a word
            raise ValueError(f"{len(plan.texts)} events do not fit into {N} clips; take fewer events or more frames.")
        self.events(plan)  # raises if an event is too short
        if world > 1 and self.whole:
            raise ValueError("video-infinity with `whole` runs in one process only; start it without torchrun.")
        if N % world or (world > 1 and N // world * f < least):
            raise ValueError(
                f"{N} clips do not fit {world} processes; each needs equally many, with at least {least} frames."
            )

    def steps(self, plan: Plan) -> int:
        return len(plan.levels) - 1

    def evaluations(self, plan: Plan, steps: int) -> int:
        return steps * (plan.recipe.latent_frames // plan.recipe.window)

    def events(self, plan: Plan) -> tuple[list[slice], list[int]]:
        """Its clips, and the event of each: of even events, as the authors assign them."""
        clips, E = S.make_windows(plan.recipe.latent_frames, plan.recipe.window, plan.recipe.window), len(plan.texts)
        if len(set(plan.durations or ())) > 1:
            return clips, assign_events(clips, E, plan.durations)
        return clips, [n * E // len(clips) for n in range(len(clips))]

    def spans(self, plan: Plan) -> list[tuple[float, float]]:
        return event_spans(*self.events(plan))

    def describe(self, plan: Plan) -> str:
        return f"{self.evaluations(plan, 1)} clips of {plan.recipe.window} frames, one batch whatever --window_batch is"

    def sample(self, backbone, plan, latents, generator, callback=None, done=lambda n: None, start=0, x0=None):
        N, E, (rank, world) = len(latents) // plan.recipe.window, len(plan.texts), rank_and_world()
        own = slice(rank * N // world, (rank + 1) * N // world)
        prompts = [plan.texts[event] for event in self.events(plan)[1]]
        x = latents.float()
        with linked_clips(backbone.pipe.transformer, N // world, self, E):
            for step in range(start, len(plan.levels) - 1):
                level, prev = plan.levels[step : step + 2]
                x0 = backbone.predict_x0(x.unflatten(0, (N, -1))[own], level.t, prompts[own])  # N/W f C H W
                x0 = exchange(x0.flatten(0, 1)[None], 0, range(len(x) // world))[1][0]  # F C H W, from all processes
                done(N)
                x = S.revert(x0, S.implied_noise(x, x0, level), prev)
                if callback:
                    callback(step, level.t, x0, x)
        return x


# --------------------------------------------------------------------------------------------------
# Which frames a frame sees


def shared_frames(clips: int, frames: int, count: int) -> list[int]:
    """Candidates for G, as many from each clip; G, the first `count`, may miss the last clips.

    A clip gives every r-th of its f frames, r = f // (count // clips), or its first if there are
    more clips than count.
    """
    each = count // clips
    stride = max(frames // each, 1) if each else frames
    return [n * frames + k for n in range(clips) for k in range(0, frames, stride)]


def logit_bias(frames: int, near: int, shared: int, bias: float, layout: bool) -> Tensor:
    """What the logits of any clip's frames get, f x (p + f + p + |G|): context, own frames, G."""
    distance = torch.arange(-near, frames + near) - torch.arange(frames)[:, None]  # f p+f+p
    local = torch.where(distance.abs() <= near, 0.0 if layout else bias, -torch.inf)
    return torch.cat([local, torch.full((frames, shared), bias if layout else 0.0)], 1)


def exchange(x: Tensor, reach: int, picked: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Neighbouring clips with their context, and some frames of all processes, by at most one
    collective.

    x: B x L x ..., this process's frames; picked: numbers of some of them, the same in every
    process. Returns B x (reach + L + reach) x ..., zero beyond the video's ends, and B x (W
    picked) x .... Raises ConnectionError.
    """
    (rank, world), k, L = rank_and_world(), len(picked), x.shape[1]
    parts = [torch.cat([x[:, list(picked)], x[:, :reach], x[:, L - reach :]], 1)]
    if world > 1:
        mine, parts = parts[0], [torch.empty_like(parts[0]) for _ in range(world)]
        together(dist.all_gather, parts, mine)
    beyond = x.new_zeros(len(x), reach, *x.shape[2:])
    before = parts[rank - 1][:, k + reach :] if rank > 0 else beyond
    after = parts[rank + 1][:, k : k + reach] if rank < world - 1 else beyond
    return torch.cat([before, x, after], 1), torch.cat([part[:, :k] for part in parts], 1)


# --------------------------------------------------------------------------------------------------
# The network


@contextmanager
def linked_clips(unet: nn.Module, clips: int, settings: VideoInfinity, events: int = 1) -> Iterator[None]:
    """Within this context a UNet3DConditionModel takes its batch for neighbouring clips of one
    video, n per process.

    Rows are (half, clip): with guidance B = 2 halves that never meet, else 1. A batch that is not a
    multiple of n raises ValueError. The network runs uncompiled, since code that was compiled
    before may pass over the hooks.
    """
    from diffusers.models.resnet import TemporalConvLayer
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    n, p, whole = clips, settings.near, settings.whole
    T = settings.t_layout if settings.t_layout is not None else 800 if events == 1 else 850
    B, f, picked, bias = 0, 0, [], torch.empty(0)  # of the current call

    def begin(_, args, kwargs):
        """Before the network: sample (B n) C f H W, one timestep for all."""
        nonlocal B, f, picked, bias
        given = dict(zip(("sample", "timestep"), args)) | kwargs
        sample, t = given["sample"], float(torch.as_tensor(given["timestep"]).flatten()[0])
        _, world = rank_and_world()
        if len(sample) % n:
            raise ValueError(f"A batch of {len(sample)} is not a multiple of {n} clips; send them all in one call.")
        B, f = len(sample) // n, sample.shape[2]
        G = shared_frames(n * world, f, settings.shared)
        picked = G[: len(G) // world]
        bias = logit_bias(f, p, len(G[: settings.shared]), settings.bias, t >= T).to(sample)

    def join(_, args, kwargs):
        """Before a convolution layer or transformer, if `whole`: the clips are one."""
        return args, kwargs | dict(num_frames=f * n)

    def widen(_, args, kwargs):
        """Before a convolution layer: (B n f) C H W -> (B n (f + 8)) C H W, which its norms see."""
        x, _ = exchange(args[0].unflatten(0, (B, n * f)), REACH)
        x = x.unfold(1, f + 2 * REACH, f).movedim(-1, 2)  # B n f+8 C H W
        return (x.flatten(0, 2),), kwargs | dict(num_frames=f + 2 * REACH)

    def cut(_, args, out):
        """After it: back to the clip's own frames."""
        return out.unflatten(0, (B * n, -1))[:, REACH : REACH + f].flatten(0, 1)

    def attend(attn, x, encoder_hidden_states=None, attention_mask=None):
        """Temporal self-attention, (B n HW) f D; if `whole`, (B HW) (n f) D."""
        if not whole:
            x = x.unflatten(0, (B, n, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (B HW) (n f) D
        q, kv = attn.to_q(x), torch.cat([attn.to_k(x), attn.to_v(x)], -1)
        near, shared = exchange(kv, p, picked)
        near = near.unfold(1, p + f + p, f).mT  # (B HW) n p+f+p 2D
        shared = shared[:, None, : settings.shared].expand(-1, n, -1, -1)  # (B HW) n |G| 2D
        k, v = torch.cat([near, shared], 2).chunk(2, -1)

        heads = lambda y: y.reshape(len(x) * n, -1, attn.heads, y.shape[-1] // attn.heads).transpose(1, 2)  # noqa: E731
        x = scaled_dot_product_attention(heads(q), heads(k), heads(v), bias)  # (B HW n) h f d
        x = x.transpose(1, 2).flatten(2).unflatten(0, (B, -1, n))  # B HW n f D
        x = x.flatten(2, 3).flatten(0, 1) if whole else x.transpose(1, 2).flatten(0, 2)
        return attn.to_out[1](attn.to_out[0](x))

    with ExitStack() as undo, torch.compiler.set_stance("force_eager"):
        hook = lambda add, *args, **options: undo.callback(add(*args, **options).remove)  # noqa: E731
        hook(unet.register_forward_pre_hook, begin, with_kwargs=True)
        for layer in unet.modules():
            if whole and isinstance(layer, TemporalConvLayer | TransformerTemporalModel):
                hook(layer.register_forward_pre_hook, join, with_kwargs=True)
            elif isinstance(layer, TemporalConvLayer):
                hook(layer.register_forward_pre_hook, widen, with_kwargs=True)
                hook(layer.register_forward_hook, cut)
            if isinstance(layer, TransformerTemporalModel):
                for attn in (attn for block in layer.transformer_blocks for attn in (block.attn1, block.attn2)):
                    undo.callback(attn.set_processor, attn.processor)
                    attn.set_processor(attend)
        yield
