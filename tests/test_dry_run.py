"""The GPU path on torch's `meta` device, small: shapes, precisions and devices fit, the memory is what it must be."""

from dataclasses import replace

import pytest
import torch
from conftest import make_pipeline
from test_opensora_plan import decoder, release, transformer  # noqa: F401
from test_videocrafter2 import clip, state, tiny_networks, vae  # noqa: F401
from test_videocrafter2 import release as videocrafter2  # noqa: F401
from test_wan import folder as wan  # noqa: F401

from backbones import RECIPES, CogVideoX, OpenSoraPlan, VideoCrafter2, Wan, get_recipe
from memory import Memory, dry_run, full_size, meta_as_gpu


@pytest.fixture(params=["sincos", "rotary", "tiled", "opensora-plan", "wan", "videocrafter2"])
def backbone_and_recipe(request, tmp_path):
    others = {  # fixture, adapter, precision, window, latent
        "opensora-plan": ("release", OpenSoraPlan, torch.float16, 8, (8, 4, 4)),
        "wan": ("wan", Wan, torch.bfloat16, 7, (4, 4, 6)),
        "videocrafter2": ("videocrafter2", VideoCrafter2, torch.float16, 5, (4, 8, 8)),
    }
    if request.param in others:
        fixture, adapter, dtype, window, latent = others[request.param]
        recipe = replace(RECIPES[request.param], window=window, latent=latent)
        return adapter(str(request.getfixturevalue(fixture)), "meta", dtype), recipe
    folder = str(tmp_path / "cogvideox")
    make_pipeline(request.param == "rotary").save_pretrained(folder)
    tiling = request.param == "tiled"
    return CogVideoX(folder, "meta", torch.float16, tiling=tiling), get_recipe("cogvideox", folder)


def test_a_whole_run_stays_on_the_device(backbone_and_recipe):
    figures = dict(dry_run(*backbone_and_recipe, (1, 2)))
    assert list(figures) == ["encode", "sampling, window batch 1", "sampling, window batch 2", "decode"]
    encode, one, two, decode = figures.values()
    assert 0 < encode and 0 < one < two and 0 < decode


def test_each_phase_holds_its_own_parts_and_no_others(backbone_and_recipe):
    backbone, _ = backbone_and_recipe
    size = lambda tensors: sum(x.untyped_storage().nbytes() for x in tensors)  # noqa: E731
    of = lambda *modules: size(x for m in modules for x in [*m.parameters(), *m.buffers()])  # noqa: E731
    with meta_as_gpu() as memory:
        backbone.encode(["it runs"])
        texts = size(x for text in backbone.texts.values() for x in text)
        assert memory.live == texts < memory.peak
        backbone.load()
        beside = texts + size(getattr(backbone, "rotary", None) or ())
        assert memory.live == of(backbone.pipe.transformer, backbone.pipe.vae) + beside
        backbone.release_transformer()
        assert memory.live == of(backbone.pipe.vae) + beside


def test_a_tensor_left_on_the_cpu_shows(backbone_and_recipe):
    backbone, recipe = backbone_and_recipe
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


def test_the_full_size_wan_is_the_released_one():
    """1.3B: 1419 million parameters."""
    pipe = full_size("wan").load_pipe("transformer")
    assert round(sum(p.numel() for p in pipe.transformer.parameters()) / 1e6) == 1419
