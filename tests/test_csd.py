"""CSD as published: equal to one long refinement of noise, and what a long run needs of it."""

from dataclasses import replace

import pytest
import torch
from helpers import call, maxdiff, randn, rng, settled

import syncos as S
from backbones import CogVideoX
from extras import options, runs
from extras.baselines import Plan
from extras.baselines.csd import CSD, csd
from extras.methods import METHODS
from extras.models.tiny import TINY
from extras.videos import read_tensors

LEVELS = CogVideoX.make_levels(TINY.scheduler, 25)
WINDOWS, PROMPTS = S.make_windows(13, 5, 2), ["a", "b", "b", "c", "c"]


def model(latents, t, prompts):
    """Any function of all its inputs."""
    shift = torch.tensor([float(ord(p)) for p in prompts]).view(-1, 1, 1, 1, 1)
    return (latents * (1 - t / 2000) + 0.3 * latents.mean(1, keepdim=True) + shift / 100).tanh()


def run(callback=None, generator=None, latents=None, start=0, x0=None, settings=CSD(12, 3, 0.1)):  # noqa: B008
    latents = randn(13, 2, 3, 3) if latents is None else latents
    return csd(model, latents, LEVELS, WINDOWS, PROMPTS, settings, generator or rng(1), callback, start, x0)


@pytest.mark.parametrize("settings", [CSD(12, 3, 0.1), CSD(3, 1, 1.0), CSD(3, 9, 0.5)])
def test_equals_one_refinement_of_noise(settings):
    args = (randn(13, 2, 3, 3), LEVELS[:-1], None, WINDOWS, PROMPTS, rng(1))
    refined = S.csd_refine(model, *args, settings.iters, settings.batch, settings.lr)
    assert torch.equal(run(settings=settings), refined)


def test_one_optimizer_throughout():
    """A new one after half of the iterations, as in each step of SynCoS, gives another result."""
    generator = rng(1)
    x = randn(13, 2, 3, 3)
    for _ in range(2):
        x = S.csd_refine(model, x, LEVELS[:-1], None, WINDOWS, PROMPTS, generator, 6, 3, 0.1)
    assert maxdiff(run(), x) > 0.01


def test_resumes_bit_for_bit():
    generator, kept = rng(1), []
    keep = lambda i, t, x0, moments: kept.append((i, t, x0, moments, generator.get_state()))  # noqa: E731
    whole = run(keep, generator)
    assert torch.equal(whole, run()) and torch.equal(kept[-1][2], whole)  # the callback has no influence
    assert [i for i, *_ in kept] == [*range(12)] and {t for _, t, *_ in kept} <= {level.t for level in LEVELS[1:-1]}
    for done in (1, 5, 11):
        _, _, x0, moments, state = kept[done - 1]
        before = x0.clone(), moments.clone()
        generator.set_state(state)
        assert moments.shape == (2, 13, 2, 3, 3)
        assert torch.equal(run(None, generator, moments, done, x0), whole)
        assert torch.equal(x0, before[0]) and torch.equal(moments, before[1])  # what was handed over stays as it is


def test_as_many_evaluations_as_syncos():
    plan = Plan(TINY, ("a", "b", "c", "d"))
    synced = METHODS["syncos"](TINY.settings)
    assert synced.evaluations(plan, 25) == 590
    assert CSD().steps(plan) == 147 and CSD().evaluations(plan, 147) == 588 and CSD(batch=3).steps(plan) == 196
    assert CSD(iters=5).steps(plan) == 5 and CSD(batch=99).evaluations(plan, 2) == 20
    with pytest.raises(ValueError, match="2 steps"):
        CSD().check(Plan(replace(TINY, num_inference_steps=1), ("a",)))


def test_demo(base, tmp_path, capsys):
    """4 steps x 3 windows + 2 refined steps x 2 x 3 = 24 of SynCoS: 8 iterations of 3 windows."""
    call(*base, "--compare", "csd", "gen-l-video", "--save_latents")
    captured = capsys.readouterr()
    assert "csd: 24 model evaluations (windows); 8 iterations of 3 windows, learning rate 0.2" in captured.out
    assert "24/24" in captured.err and (tmp_path / "video.png").exists()
    latents, _ = read_tensors(tmp_path / "video.safetensors", "latents")
    assert latents["csd"].shape == (9, 4, 2, 4) and latents["csd"].isfinite().all()


@pytest.mark.parametrize("method", ["csd", "ditctrl-sde"])
def test_resumes_from_disk(method, any_method, tmp_path):
    args = settled(*any_method, "--num_frames", 41, "--method", method)
    run, path = options.plan_run(args), tmp_path / "state.safetensors"
    backbone = run.plan.recipe.make(run.device, run.dtype)
    backbone.encode(run.plan.texts)
    backbone.load()

    def stop(name, step, x0):
        if step == 2:
            raise KeyboardInterrupt

    whole = runs.sample(run, backbone, runs.State(run.about()))[method]
    with pytest.raises(KeyboardInterrupt):
        runs.sample(run, backbone, runs.State(run.about()), path, stop)
    state = runs.State.read(path, run.about())
    assert state.step == 3 and torch.equal(runs.sample(run, backbone, state)[method], whole)
