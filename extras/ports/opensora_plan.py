"""Open-Sora Plan v1.3: video transformer and WF-VAE decoder, for the released weights.

Written from the facts of the official code (github.com/PKU-YuanGroup/Open-Sora-Plan, tag v1.3.0),
with its parameter names, so that its files load strictly. Inference only: no encoder, no training,
no masks except the text's.

    B batch, T latent frames, C channels, H x W latent size; S tokens of width D; L text tokens
"""

from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.normalization import AdaLayerNormSingle
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import MT5EncoderModel

from extras.loading import Parts, fill, load_network, load_tokenizer, read_checkpoint


class Ported(ModelMixin, ConfigMixin):
    """A model with settings that this port leaves free, and others that it fixes (`fixed`)."""

    fixed: dict

    @classmethod
    def from_config(cls, config: dict, **kwargs):
        """Raises ValueError if the configuration needs what the port lacks; ignores other keys."""
        for key, value in cls.fixed.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} must be {value!r} for this port; config.json has {config[key]!r}.")
        return super().from_config({k: v for k, v in config.items() if k in signature(cls).parameters}, **kwargs)


# --------------------------------------------------------------------------------------------------
# The transformer


def rotary_table(grid: tuple[int, int, int], scales: tuple[float, float, float], head_dim: int) -> Tensor:
    """Angles of the 3-D rotary positions of a T x H x W grid: (S, 3, head_dim / 6), float32.

    t, h and w use a third of the head each. Positions start at 0 and are divided by the scale.
    """
    n = head_dim // 6
    frequencies = 10000 ** -(torch.arange(n) / n)
    angles = [torch.arange(size)[:, None] / scale * frequencies for size, scale in zip(grid, scales)]
    t, h, w = (a.view(*(-1 if i == axis else 1 for i in range(3)), n) for axis, a in enumerate(angles))
    return torch.stack(torch.broadcast_tensors(t, h, w), -2).flatten(0, 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Apply rotary positions to x (B, heads, S, head_dim): in each third, the first half pairs with
    the second."""
    a, b = x.float().unflatten(-1, (3, 2, -1)).unbind(-2)  # B heads S 3 n
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3).to(x.dtype)


def to_sets(x: Tensor, n: int, grouped: bool) -> Tensor:
    """Skiparse: (B, heads, S, d) -> (B n, heads, S / n, d), sets that attend to themselves.

    Single skip: token s is in set s mod n; grouped: in set floor(s / n) mod n. n^2 divides S.
    """
    return x.unflatten(2, (-1, n, n)).movedim(3 if grouped else 4, 1).flatten(3, 4).flatten(0, 1)


def from_sets(x: Tensor, n: int, grouped: bool) -> Tensor:
    """The inverse of `to_sets`."""
    return x.unflatten(0, (-1, n)).unflatten(3, (-1, n)).movedim(1, 3 if grouped else 4).flatten(2, 4)


class Attention(nn.Module):
    """Multi-head attention to x itself or to a context. `sparse` is None (dense) or (n, grouped),
    see `to_sets`."""

    def __init__(self, dim: int, heads: int, sparse: tuple[int, bool] | None = None):
        super().__init__()
        self.heads, self.sparse = heads, sparse
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, angles: Tensor | None = None
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)  # B S D, B L D, B L D
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # B heads S d
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if self.sparse:
            S, pad = q.shape[2], -q.shape[2] % self.sparse[0] ** 2  # padding at the end, never attended to
            q, k, v = (to_sets(F.pad(y, (0, 0, 0, pad)), *self.sparse) for y in (q, k, v))
            if pad:
                real = (torch.arange(S + pad, device=x.device) < S).view(1, 1, -1, 1).expand(len(x), -1, -1, -1)
                mask = to_sets(real, *self.sparse).transpose(2, 3)  # B n, 1, 1, (S + pad) / n
            y = from_sets(F.scaled_dot_product_attention(q, k, v, mask), *self.sparse)[:, :, :S]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float, sparse: tuple[int, bool] | None):
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn1 = Attention(dim, heads, sparse)
        self.attn2 = Attention(dim, heads)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, adaln: Tensor, angles: Tensor) -> Tensor:
        """x (B, S, D), text (B, L, D), mask (B, 1, 1, L), adaln (B, n, 6, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + adaln).chunk(6, 2)  # B n 1 D each
        x = x + scaled(self.attn1(modulate(x, shift1, scale1, self.eps), angles=angles), gate1)
        x = x + self.attn2(x, text, mask)  # neither norm nor gate
        return x + scaled(self.ff(modulate(x, shift2, scale2, self.eps)), gate2)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply tokens (B, S, D), in n equal parts, by one scale each, (B, n, 1, D)."""
    return (x.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (scale.shape[1], -1))  # B n S/n D
    return (x * (1 + scale) + shift).flatten(1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """B T C H W -> B S D, tokens in the order t, h, w."""
        return self.proj(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2]).flatten(1, 2)


class OpenSoraT2V_v1_3(Ported):
    """The diffusion transformer; predicts v. Defaults: the released model (2.77 B parameters)."""

    fixed = dict(patch_size_t=1, activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False,
                 sparse1d=True, only_cross_attention=False, double_self_attention=False)  # fmt: skip

    @register_to_config
    def __init__(
        self,
        num_layers: int = 32,
        num_attention_heads: int = 24,
        attention_head_dim: int = 96,
        in_channels: int = 8,
        out_channels: int = 8,
        caption_channels: int = 4096,
        patch_size: int = 2,
        norm_eps: float = 1e-6,
        sparse_n: int = 4,
        interpolation_scale_t: float = 1.0,
        interpolation_scale_h: float = 1.0,
        interpolation_scale_w: float = 1.0,
        sample_size_t: int = 24,
        sample_size_h: int | tuple = (44, 80),  # range of latent sizes in training
        sample_size_w: int | tuple = (44, 80),
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)
        self.adaln_single = AdaLayerNormSingle(dim)
        sparse = [(sparse_n, i % 2 == 1) if 1 < i < 30 else None for i in range(num_layers)]  # whatever the depth
        self.transformer_blocks = nn.ModuleList(Block(dim, num_attention_heads, norm_eps, s) for s in sparse)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Latents (B, T, C, H, W), timestep (B,) or (B, T) of 0 to 999 in float32 (bfloat16 cannot
        hold 999), text (B, L, caption_channels) with its mask (B, L), true for words -> v, in the
        shape of the latents."""
        c, (T, _, H, W) = self.config, latents.shape[1:]
        p = c.patch_size
        grid = (T, H // p, W // p)
        scales = (c.interpolation_scale_t, c.interpolation_scale_h, c.interpolation_scale_w)
        angles = rotary_table(grid, scales, c.attention_head_dim).to(latents.device)

        x = self.pos_embed(latents)
        adaln, embedded = self.adaln_single(timestep.float().flatten(), hidden_dtype=x.dtype)  # B n 6D, B n D, n 1 or T
        adaln, embedded = adaln.view(len(x), -1, 6, x.shape[-1]), embedded.view(len(x), -1, 1, x.shape[-1])
        text, mask = self.caption_projection(text), text_mask.bool()[:, None, None]
        for block in self.transformer_blocks:
            x = block(x, text, mask, adaln, angles)
        shift, scale = (self.scale_shift_table + embedded).chunk(2, 2)  # of the embedding itself, no SiLU
        x = self.proj_out(modulate(x, shift, scale, 1e-6))
        return x.unflatten(1, grid).unflatten(-1, (p, p, -1)).permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


# --------------------------------------------------------------------------------------------------
# The WF-VAE's decoder. Its modules take (x, past): x is the next piece of the video, B C T H W.


class Past:
    """What modules keep of a video's earlier pieces, each under its own key; empty at the start.
    (A plain dict would be copied by offload hooks.)"""

    def __init__(self):
        self.kept: dict[object, Tensor] = {}
        self.last = False  # whether this piece is the last


class CausalConv3d(nn.Module):
    """Pads frames with zeros, and time with two frames in front: the last two, or at first the
    first frame twice."""

    def __init__(self, channels: int, out: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv3d(channels, out, kernel, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.conv.kernel_size[0] == 3:
            x = torch.cat([past.kept.get(self, x[:, :, :1].expand(-1, -1, 2, -1, -1)), x], 2)
            past.kept[self] = x[:, :, -2:].clone()  # a view would keep all of x
        return self.conv(x)


class FrameConv2d(nn.Conv2d):
    """A 3 x 3 convolution of every frame."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3, padding=1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class Norm(nn.Module):
    """LayerNorm over the channels at each position."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(channels), CausalConv3d(channels, out)
        self.norm2, self.conv2 = Norm(out), CausalConv3d(out, out)
        if channels != out:
            self.nin_shortcut = CausalConv3d(channels, out, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), past)
        h = self.conv2(F.silu(self.norm2(h)), past)
        return h + (self.nin_shortcut(x, past) if hasattr(self, "nin_shortcut") else x)


class FrameAttention(nn.Module):
    """One head over the positions of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h, past).movedim(1, -1).flatten(2, 3)[:, :, None] for f in (self.q, self.k, self.v))  # B T 1 HW C
        h = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # BT 1 HW C
        h = h.view(len(x), -1, *x.shape[3:], x.shape[1]).movedim(-1, 1)  # B C T H W
        return x + self.proj_out(h, past)


class SpaceUpsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConv2d(channels, channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class SpaceTimeUpsample(nn.Module):
    """Doubles height, width and all frames but the first, which is not interpolated over time.

    A frame's second half needs the next frame, so the last frame of a piece waits for the next
    piece, if there is one.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        out, x = (x[:, :, :0], x) if self in past.kept else (x[:, :, :1], x[:, :, 1:])
        before = past.kept.get(self, x[:, :, :0])  # [done, waiting], [waiting] or nothing
        x = torch.cat([before, x], 2)
        past.kept[self] = x[:, :, -2:]
        if x.shape[2]:
            doubled = F.interpolate(x, scale_factor=(2, 1, 1), mode="trilinear")
            start, stop = 2 * (before.shape[2] == 2), doubled.shape[2] - 2 * (not past.last)
            out = torch.cat([out, doubled[:, :, start:stop]], 2)
        return self.conv(F.interpolate(out, scale_factor=(1, 2, 2), mode="trilinear"), past)


class Chain(nn.ModuleList):
    def forward(self, x: Tensor, past: Past) -> Tensor:
        for module in self:
            x = module(x, past)
        return x


def inverse_haar_3d(x: Tensor, first: bool) -> Tensor:
    """(B, 8 c, T, H, W) -> (B, c, 2T, 2H, 2W); at the start of a video, drops the first frame.

    Band 4 bt + 2 bh + bw changes sign with every second frame (bt), row (bh), column (bw). The gain
    is the official literal, not 1 / sqrt(8).
    """
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype, device=x.device)  # band bit, parity
    bands = x.unflatten(1, (2, 2, 2, -1))
    out = 0.3536 * torch.einsum("zijkcthw,ia,jb,kd->zctahbwd", bands, signs, signs, signs)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, int(first) :]


def inverse_haar_2d(x: Tensor) -> Tensor:
    """(B, 4 c, T, H, W) -> (B, c, T, 2H, 2W). Band 2 bw + bh: the reverse of the order in 3-D."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype, device=x.device)
    out = 0.5 * torch.einsum("zijcthw,jb,id->zcthbwd", x.unflatten(1, (2, 2, -1)), signs, signs)
    return out.flatten(5, 6).flatten(3, 4)


class WFVAEDecoder(Ported):
    """The decoder of WFVAEModel_D8_4x8x8: 8x in space, 4x in time. Defaults: released (110 M)."""

    fixed = dict(norm_type="layernorm", t_interpolation="trilinear", use_attention=True)

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 8,
        base_channels: int = 128,
        decoder_energy_flow_hidden_size: int = 128,
        decoder_num_resblocks: int = 2,
        connect_res_layer_num: int = 2,
        scale: float = 0.18215,
    ):
        super().__init__()
        c, e = base_channels, decoder_energy_flow_hidden_size
        res = lambda a, b, n: [ResnetBlock(a if i == 0 else b, b) for i in range(n)]  # noqa: E731
        n, m = decoder_num_resblocks, connect_res_layer_num
        self.conv_in = CausalConv3d(latent_dim, 4 * c)
        self.mid = Chain([ResnetBlock(4 * c, 4 * c), FrameAttention(4 * c), ResnetBlock(4 * c, 4 * c + e)])
        self.up2 = Chain([*res(4 * c, 4 * c, n), SpaceTimeUpsample(4 * c), ResnetBlock(4 * c, 4 * c + e)])
        self.up1 = Chain([*res(4 * c, 2 * c, n), SpaceUpsample(2 * c), ResnetBlock(2 * c, 2 * c)])
        self.layer = Chain(res(2 * c, c, 2))
        self.connect_l2 = Chain([*res(e, e, m), FrameConv2d(e, 24)])
        self.connect_l1 = Chain([*res(e, e, m), FrameConv2d(e, 12)])
        self.norm_out, self.conv_out = Norm(c), FrameConv2d(c, 24)

    def forward(self, z: Tensor, past: Past) -> Tensor:
        """Decode the next piece of a video: unscaled latents (B, C, T, H, W) -> frames (B, 3, 4T,
        8H, 8W) about [-1, 1], at first 3 fewer. The last latent frame's come with the next piece
        (see SpaceTimeUpsample)."""
        e, first = self.config.decoder_energy_flow_hidden_size, not past.kept
        h = self.mid(self.conv_in(z, past), past)
        h, low = h[:, :-e], h[:, -e:]
        low = inverse_haar_3d(self.connect_l2(low, past), first)  # 3, 2T, 2H, 2W
        low = torch.cat([past.kept.get("low", low[:, :, :0]), low], 2)
        h = self.up2(h, past)
        past.kept["low"], low = low[:, :, h.shape[2] :], low[:, :, : h.shape[2]]  # holds back what up2 holds back

        h, detail = h[:, :-e], self.connect_l1(h[:, -e:], past)
        low = inverse_haar_2d(torch.cat([detail[:, :3] + low, detail[:, 3:]], 1))  # 3, 2T, 4H, 4W
        h = self.layer(self.up1(h, past), past)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return inverse_haar_3d(torch.cat([h[:, :3] + low, h[:, 3:]], 1), first)

    @torch.no_grad()
    def decode(self, latents: Tensor, piece: int = 2) -> Iterator[Tensor]:
        """Latents (B, C, F, H, W) from the transformer -> (B, 3, n, 8H, 8W), 4(F - 1) + 1 frames.

        Decodes in pieces of `piece` latent frames (the first has one more). The frames equal those
        of one call, in memory independent of F, because all convolutions are causal and the
        upsampler looks one latent frame ahead.
        """
        z, past = latents / self.config.scale, Past()
        pieces = [z[:, :, : piece + 1], *(p for p in z[:, :, piece + 1 :].split(piece, 2) if p.shape[2])]
        for i, part in enumerate(pieces):
            past.last = i == len(pieces) - 1
            yield self(part, past)


# --------------------------------------------------------------------------------------------------
# Loading

TRANSFORMER = "any93x640x640"  # the released folder of the text-to-video model
TEXT_ENCODER = "google/mt5-xxl"


def load_pipe(model: str, dtype: torch.dtype, parts: Sequence[str]) -> Parts:
    """Load some parts of a folder or hub id laid out like LanguageBind/Open-Sora-Plan-v1.3.0.

    Tokenizer and text encoder come from its mt5-xxl/ if it is a folder that has one, else from
    TEXT_ENCODER. Raises ValueError if something is missing or does not fit.
    """
    text = str(Path(model) / "mt5-xxl") if (Path(model) / "mt5-xxl").is_dir() else TEXT_ENCODER
    load = dict(
        tokenizer=lambda: load_tokenizer(text, ""),
        text_encoder=lambda: load_network(MT5EncoderModel, text, "", dtype),
        transformer=lambda: load_network(OpenSoraT2V_v1_3, model, TRANSFORMER, dtype, strict=True),
        vae=lambda: nn.Module.to(load_decoder(model), dtype),  # diffusers' own warns needlessly
    )
    return Parts.make(lambda name: load[name](), parts)


def load_decoder(model: str) -> WFVAEDecoder:
    """Load the decoder of a folder or hub id, from vae/config.json and vae/merged.ckpt.

    merged.ckpt is a pickle: it is read with weights_only, which runs none of its code. It holds two
    decoders, from two stages of training, whose names differ only by "module."; the later one is
    used. Raises ValueError if something is missing, is not a plain tensor, or does not fit.
    """
    try:
        decoder = WFVAEDecoder.from_config(WFVAEDecoder.load_config(model, subfolder="vae"))
        path = Path(model) / "vae" / "merged.ckpt"
        path = path if Path(model).is_dir() else hf_hub_download(model, "vae/merged.ckpt")
        state = read_checkpoint(path)
    except OSError as error:
        raise ValueError(f"Cannot load {model}/vae, which needs config.json and merged.ckpt: {error}") from error
    for key in ("ema_state_dict", "state_dict", "gen_model"):
        state = state.get(key) or state
    state = {key.replace("module.", ""): value for key, value in state.items()}  # in their order: later ones win
    state = {k[8:]: v for k, v in state.items() if k.startswith("decoder.") and "wavelet" not in k}
    fill(decoder, state, str(path))
    return decoder.eval()
