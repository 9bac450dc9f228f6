"""The GPU path on torch's `meta` device, small: shapes, precisions and devices fit, the memory is
what it must be."""

from dataclasses import replace

import pytest
import torch

from backbones import OPENSORA_PLAN
from extras.measure.memory import Memory, dry_run, full_size, meta_as_gpu
from extras.models import get_recipe
from extras.models.videocrafter2 import VIDEOCRAFTER2
from extras.models.wan import WAN
from syncos import Settings

ONE = Settings(csd_batch=1)  # a short stage 2: what counts every storage is slow
SMALL = {  # fixture, recipe
    "opensora-plan": ("opensora_release", replace(OPENSORA_PLAN, window=8, latent=(8, 4, 4), settings=ONE)),
    "wan": ("wan_folder", replace(WAN, window=7, latent=(4, 4, 6), settings=ONE)),
    "videocrafter2": ("videocrafter2_release", replace(VIDEOCRAFTER2, window=5, latent=(4, 8, 8), settings=ONE)),
}


def make(request, kind):
    """A backbone on meta, and its recipe. "sincos" decodes in tiles."""
    if kind in SMALL:
        fixture, recipe = SMALL[kind]
        folder, options = str(request.getfixturevalue(fixture)), {}
    else:
        folder, options = request.getfixturevalue(f"{kind}_folder"), dict(tiling=kind == "sincos")
        recipe = replace(get_recipe("cogvideox", folder), stride=2, settings=ONE)
    return recipe.backbone(folder, "meta", getattr(torch, recipe.dtype), **options), recipe


@pytest.mark.parametrize("kind", ["sincos", "rotary", "cogvideox15", *SMALL])
def test_a_whole_run_stays_on_the_device(request, kind):
    figures = dict(dry_run(*make(request, kind), (1, 2) if kind == "rotary" else (1,)))
    assert list(figures)[:2] == ["encode", "sampling, window batch 1"] and min(figures.values()) > 0
    if kind == "rotary":
        assert figures["sampling, window batch 1"] < figures["sampling, window batch 2"]


@pytest.mark.parametrize("kind", ["rotary", "cogvideox15", *SMALL])
def test_each_phase_holds_its_own_parts_and_no_others(request, kind):
    backbone, _ = make(request, kind)
    size = lambda tensors: sum(x.untyped_storage().nbytes() for x in tensors)  # noqa: E731
    of = lambda *modules: size(x for m in modules for x in [*m.parameters(), *m.buffers()])  # noqa: E731
    with meta_as_gpu() as memory:
        backbone.encode(["it runs"])
        texts = size(x for text in backbone.texts.values() for x in text)
        assert memory.live == texts < memory.peak
        backbone.load()
        assert memory.live == of(backbone.pipe.transformer, backbone.pipe.vae) + texts
        backbone.release_transformer()
        assert memory.live == of(backbone.pipe.vae) + texts


def test_a_tensor_left_on_the_cpu_shows(request):
    backbone, recipe = make(request, "rotary")
    with meta_as_gpu():
        backbone.encode(["it runs"])
        backbone.load()
        for text, tensors in backbone.texts.items():
            backbone.texts[text] = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in tensors)
        x, t = torch.zeros(1, recipe.window, *recipe.latent, device="meta"), backbone.levels(4)[1].t
        with pytest.raises(RuntimeError, match="device|meta"):
            backbone.predict_x0(x, t, ["it runs"])


def test_storages_count_once_and_while_they_live():
    with Memory() as memory:
        x = torch.empty(1000, device="meta")
        y, z = x[10:], torch.empty(1000)
        assert memory.live == 4000 and (y.device, z.device) == (x.device, torch.device("cpu"))
        del x
        assert memory.live == 4000  # y holds it
        del y
        assert memory.live == 0 and memory.take() == 4000 / 2**30 and memory.take() == 0


@pytest.mark.parametrize("name, millions", {"wan": 1419, "cogvideox-1.5": 5571}.items())
def test_the_full_size_model_is_the_released_one(name, millions):
    pipe = full_size(name).load_pipe("transformer")
    assert round(sum(p.numel() for p in pipe.transformer.parameters()) / 1e6) == millions
