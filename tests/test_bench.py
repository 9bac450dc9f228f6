"""The benchmark's parts at toy sizes: that they run, and that what they compare is the same thing."""

from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import bench as B
from syncos import csd_gradient


@pytest.fixture
def small(monkeypatch):
    """Latents of 4 x 2 x 4 instead of 16 x 60 x 90, and a transformer for them."""
    monkeypatch.setattr(B, "BIG", replace(B.BIG, latent=(4, 2, 4)))

    def make(layers, dtype):
        torch.manual_seed(0)
        return CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            num_layers=1, sample_width=4, sample_height=2,
        ).eval().requires_grad_(False)  # fmt: skip

    monkeypatch.setattr(B, "make_2b", make)
    B.evaluation_seconds.cache_clear()
    yield
    B.evaluation_seconds.cache_clear()


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_the_naive_gradient_is_ours(batch):
    x0, noisy, predicted = torch.randn(3, batch, 5, 2, 3, 4, generator=torch.Generator().manual_seed(batch))
    a, b = (f(x0, noisy, predicted, B.LEVEL) for f in (csd_gradient, B.naive_gradient))
    assert (a - b).abs().max() < 1e-5


def test_peak_sees_what_is_freed_again():
    assert 64 <= B.in_new_process(peak_of_64_mib) < 80


def peak_of_64_mib():
    return B.peak(lambda: torch.ones(64 * 2**18).sum())


def test_the_paper_needs_as_many_evaluations_as_the_readme_says():
    counts = [B.evaluations(B.BIG, method) for method in ("gen-l-video", "syncos")]
    assert counts == [500, 1220]


def test_rows_come(small):
    rows = [*B.model(), *B.overhead()]
    assert [what.split(",")[0] for what, _ in rows] == ["2B"] + ["outside the model"] * 4


def test_the_rows_for_a_gpu_come(small, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(B, "BIG", replace(B.BIG, num_inference_steps=2))
    rows = dict(B.whole_model(0.5))
    assert len(rows) == 8 + 5 and rows["2B, torch.bfloat16, 2 windows, guidance in 1 call"].endswith("weights")
