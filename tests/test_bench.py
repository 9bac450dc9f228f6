"""The benchmark's parts at toy sizes: they run, and count what they should."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from helpers import randomize

from extras.measure import bench as B


@pytest.fixture
def small(monkeypatch):
    """Latents of 4 x 2 x 4 instead of 16 x 60 x 90, and a transformer for them."""
    monkeypatch.setattr(B, "BIG", replace(B.BIG, latent=(4, 2, 4)))

    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8)
    config |= dict(num_layers=1, sample_width=4, sample_height=2)
    transformer = randomize(CogVideoXTransformer3DModel(**config))
    monkeypatch.setattr(B, "make_2b", lambda layers, dtype: transformer)
    B.evaluation_seconds.cache_clear()
    yield
    B.evaluation_seconds.cache_clear()


@pytest.mark.skipif(math.isnan(B.peak(lambda: None)), reason="this system does not count a process's memory")
def test_peak_sees_what_is_freed_again():
    assert 64 <= B.in_new_process(peak_of_64_mib) < 80


def peak_of_64_mib():
    return B.peak(lambda: torch.ones(64 * 2**18, device=B.DEVICE).sum())


def test_the_paper_needs_as_many_evaluations_as_the_readme_says():
    assert [B.evaluations(B.BIG, method) for method in ("gen-l-video", "syncos")] == [500, 1220]


def test_rows_come(small):
    rows = [*B.model(), *B.overhead()]
    assert [what.split(",")[0] for what, _ in rows] == ["2B"] + ["outside the model"] * 4


def test_the_rows_for_a_gpu_come(small, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(B, "BIG", replace(B.BIG, num_inference_steps=2))
    rows = dict(B.whole_model(0.5))
    assert len(rows) == 8 + 5 and rows["2B, torch.bfloat16, 2 windows, guidance in 1 call"].endswith("weights")
