"""DiTCtrl against a naive transcription, closed forms and an attention processor of its own."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from helpers import call, maxdiff, randn, rng, run_processes

import syncos as S
from backbones import COGVIDEOX_2B, CogVideoX
from extras.baselines import Plan
from extras.baselines.ditctrl import DiTCtrl, blend, ditctrl, mix_texts, pair_predictor, sde_step
from extras.models import RECIPES
from extras.models.checked import CheckedCogVideoX
from extras.videos import read_tensors

LEVELS = {steps: CogVideoX.make_levels(COGVIDEOX_2B.scheduler, steps) for steps in (12, 25, 50)}
SOLVERS = pytest.mark.parametrize("sde", [False, True], ids=["ddim", "sde"])
SHAPE = (49, 2, 3, 3)
WINDOWS = S.make_windows(49, 13, 4)


class Gaussian:
    """The posterior mean of frames that are N(prompt, 0.5^2). `mix`: how much a frame sees of its
    window's mean, and a target of its source's."""

    def __init__(self, levels, mix=0.0):
        self.at, self.mix, self.calls = {level.t: level for level in levels}, mix, 0

    def __call__(self, latents, t, prompts):
        _, a, s = self.at[t]
        self.calls += len(latents)
        centres = torch.tensor([float(p) for p in prompts]).view(-1, 1, 1, 1, 1)
        gain = a * 0.25 / (a**2 * 0.25 + s**2)
        return centres + gain * (latents - a * centres) + self.mix * latents.mean(1, keepdim=True).tanh()

    def pairs(self, latents, t, prompts):
        assert len(prompts) % 2 == 0
        out = self(latents, t, prompts)
        out[1::2] += self.mix * latents[::2].mean(1, keepdim=True)
        return out


class Constant:
    """A model that always predicts 0.7."""

    def __call__(self, latents, t, prompts):
        return torch.full_like(latents, 0.7)

    pairs = __call__


def run(model, levels, windows=WINDOWS, texts=None, callback=None, generator=None, **settings):
    frames, texts = windows[-1].stop, texts or ["0.3"] * len(windows)
    noise = randn(frames, *SHAPE[1:])
    return ditctrl(
        model, model.pairs, noise, levels, windows, texts, DiTCtrl(**settings), generator or rng(1), callback
    )


def naive(model, levels, windows, texts, sde):
    """The authors' loops: all pairs in all steps, sums by frame, the solver in their symbols."""
    F, f, generator, last, h_last = windows[-1].stop, windows[0].stop, rng(1), None, None
    x = randn(F, *SHAPE[1:])
    for (t, a, s), (_, a2, s2) in zip(levels, levels[1:]):
        total, count = torch.zeros_like(x), torch.zeros(F)
        for k in range(len(windows) - 1):
            predict = model.pairs if 500 <= t < 979 else model
            pair = predict(torch.stack([x[windows[k]], x[windows[k + 1]]]), t, texts[k : k + 2])
            for window, x0 in zip(windows[k : k + 2], pair):
                for j in range(f):
                    weight = min(2 * j + 1, 2 * f - 1 - 2 * j) / f
                    total[window.start + j] += weight * x0[j]
                    count[window.start + j] += weight
        x0 = total / count.view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=generator)
        if not sde:
            x = a2 * x0 + s2 * (x - a * x0) / s
        elif s2 == 0:
            x = x0
        else:
            h = math.log(a2 / s2) - (math.log(a / s) if a else -math.inf)
            r = h_last / h if last is not None else None
            D = x0 if last is None else (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
            x = s2 / s * math.exp(-h) * x + a2 * (1 - math.exp(-2 * h)) * D
            x += s2 * math.sqrt(1 - math.exp(-2 * h)) * noise
            last, h_last = x0, h
    return x


# --------------------------------------------------------------------------------------------------
# The method


@SOLVERS
def test_as_the_authors_loops_with_fewer_evaluations(sde):
    for steps, windows, saved, all_pairs in ((50, WINDOWS, 684, 900), (12, S.make_windows(55, 13, 7), None, None)):
        texts = [str(k / 10) for k in range(len(windows))]
        ours, theirs = Gaussian(LEVELS[steps], mix=0.1), Gaussian(LEVELS[steps], mix=0.1)
        got = run(ours, LEVELS[steps], windows, texts, sde=sde)
        assert maxdiff(got, naive(theirs, LEVELS[steps], windows, texts, sde)) < 1e-5
        assert saved is None or (ours.calls, theirs.calls) == (saved, all_pairs)


def test_frames_alone_are_plain_ddim():
    """If the model sees each frame alone, neither windows nor weights matter."""
    model = Gaussian(LEVELS[25])
    ddim = S.Settings(**S.GEN_L_VIDEO)
    plain = S.syncos(model, randn(*SHAPE), LEVELS[25], [slice(0, 49)], ["0.3"], ddim, rng())
    assert maxdiff(run(model, LEVELS[25]), plain) < 2e-6


@SOLVERS
def test_a_model_that_always_says_the_same(sde):
    assert maxdiff(run(Constant(), LEVELS[12], sde=sde), torch.full(SHAPE, 0.7)) < 1e-6


def test_weights_by_hand():
    """Windows that say their number. Frame 4 is place 4 of window 0, weight 9/13, and place 0 of
    window 1, weight 1/13, which counts twice, like all but the first and the last; frame 12 lies in
    windows 0 to 3, frame 44 in 8 and 9."""
    said = torch.arange(10.0).view(10, 1, 1, 1, 1).expand(10, 13, 1, 1, 1)
    got = blend(said, WINDOWS, [1] + [2] * 8 + [1], 49).flatten()
    assert got[0] == 0 and got[48] == 9
    assert got[4].item() == pytest.approx(2 * 1 * 1 / (9 + 2 * 1))
    assert got[12].item() == pytest.approx((1 * 2 * 9 + 2 * 2 * 9 + 3 * 2 * 1) / (1 + 2 * 9 + 2 * 9 + 2 * 1))
    assert got[44].item() == pytest.approx((8 * 2 * 1 + 9 * 9) / (2 * 1 + 9))


def test_the_sde_solver_samples_a_gaussian():
    """Standard deviation 0.5 in the limit; DDIM's with as many steps is further off."""
    levels, windows = LEVELS[50], S.make_windows(97, 13, 4)
    deviations = {sde: run(Gaussian(levels), levels, windows, sde=sde).std().item() for sde in (False, True)}
    assert deviations[False] < deviations[True] < 0.5 and deviations[True] == pytest.approx(0.457, abs=0.02)
    x, x0 = randn(4), randn(4, seed=1)
    assert torch.equal(sde_step(x, x0, randn(4, seed=2), levels, 49, randn(4, seed=3)), x0)  # the last one ends clean


@SOLVERS
def test_resumes_bit_for_bit(sde):
    model, steps = Gaussian(LEVELS[12], mix=0.1), []
    generator = rng(1)
    keep = lambda step, t, x0, x: steps.append((t, x0.clone(), x.clone(), generator.get_state()))  # noqa: E731
    whole = run(model, LEVELS[12], callback=keep, generator=generator, sde=sde)
    assert [t for t, *_ in steps] == [level.t for level in LEVELS[12][:-1]]
    for done in (1, 2, 7, 11):
        _, x0, x, state = steps[done - 1]
        generator.set_state(state)
        rest = (LEVELS[12], WINDOWS, ["0.3"] * 10, DiTCtrl(sde=sde), generator, None, done, x0)
        again = ditctrl(model, model.pairs, x, *rest)
        assert torch.equal(again, whole)


def test_texts_glide():
    backbone = CogVideoX.__new__(CogVideoX)
    backbone.texts = {name: (randn(5, 3, seed=i),) for i, name in enumerate("abc")}
    (a,), (b,), (c,) = backbone.texts.values()
    assert mix_texts(backbone, "ab", 0) == ["a", "b"]
    keys = mix_texts(backbone, "abc", 2)
    assert len(keys) == 7 and keys[::3] == ["a", "b", "c"] and len(set(keys)) == 7
    for key, expected in zip(keys, (a, (2 * a + b) / 3, (a + 2 * b) / 3, b, (2 * b + c) / 3, (b + 2 * c) / 3, c)):
        assert maxdiff(backbone.texts[key][0], expected) < 1e-6
    (half,) = backbone.texts[mix_texts(backbone, "ab", 1)[1]]
    assert maxdiff(half, (a + b) / 2) < 1e-6


# --------------------------------------------------------------------------------------------------
# Keys and values, in the network


def tiny_plan(folder, **change):
    recipe = replace(
        COGVIDEOX_2B, model=folder, **CheckedCogVideoX.inspect(folder), num_inference_steps=4, window_batch=3
    )
    return Plan(replace(recipe, stride=2, num_frames=41, **change), ("it runs", "it jumps"))


@pytest.fixture
def backbone(pipeline_folder):
    backbone = CogVideoX(pipeline_folder)
    backbone.encode(["it runs", "it jumps", "it sleeps"])
    backbone.load()
    backbone.levels(4)
    return backbone


X, PROMPTS = randn(4, 5, 4, 2, 4), ["it runs", "it jumps", "it sleeps", "it runs"]


class SharedProcessor(CogVideoXAttnProcessor2_0):
    """diffusers' processor, with odd rows' keys and values replaced after norm and rotation."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        L = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = (layer(x) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (torch.cat([y[:, :, :L], apply_rotary_emb(y[:, :, L:], image_rotary_emb)], 2) for y in (q, k))
        k, v = k.clone(), v.clone()
        for row in range(1, len(k), 2):
            k[row], v[row] = k[row - 1], v[row - 1]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = attn.to_out[0](out)
        return out[:, L:], out[:, :L]


def test_targets_use_the_keys_of_their_sources(backbone):
    plain = backbone.predict_x0(X, 749, PROMPTS)
    with pair_predictor(backbone, 1 / 6) as predict_pairs:
        assert torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)  # between its calls nothing is shared
        shared = predict_pairs(X, 749, PROMPTS)
        assert torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)
        same = predict_pairs(X[[0, 0, 1, 1]], 749, [PROMPTS[i] for i in (0, 0, 1, 1)])
    assert torch.equal(same, backbone.predict_x0(X[[0, 0, 1, 1]], 749, [PROMPTS[i] for i in (0, 0, 1, 1)]))
    assert torch.equal(shared[::2], plain[::2])  # sources
    assert (shared[1::2] - plain[1::2]).abs().amax((1, 2, 3, 4)).min() > 1e-4  # targets
    backbone.pipe.transformer.transformer_blocks[-1].attn1.set_processor(SharedProcessor())  # the last of two blocks
    assert torch.equal(backbone.predict_x0(X, 749, PROMPTS), shared)


@pytest.mark.parametrize("pipeline_folder", ["rotary"], indirect=True)
def test_shared_under_offload_and_compiled(backbone, pipeline_folder, monkeypatch):
    import accelerate

    with pair_predictor(backbone, 1 / 6) as predict_pairs:
        shared = predict_pairs(X, 749, PROMPTS)
    backbone.pipe.transformer.compile(backend="eager")
    plain = backbone.predict_x0(X, 749, PROMPTS)  # compiled without hooks
    for _ in range(2):
        with pair_predictor(backbone, 1 / 6) as predict_pairs:
            assert torch.equal(predict_pairs(X, 749, PROMPTS), shared)
            assert torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)
        assert torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)

    hook = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: hook(model, "cpu", **options))
    offloaded = CogVideoX(pipeline_folder, offload="sequential")
    offloaded.encode(PROMPTS)
    offloaded.load()
    offloaded.levels(4)
    with pair_predictor(offloaded, 1 / 6) as predict_pairs:
        assert torch.equal(predict_pairs(X, 749, PROMPTS), shared)


def test_hooks_are_gone_after_a_run_and_after_an_exception(backbone, pipeline_folder):
    hooks = lambda: sum(len(m._forward_hooks) for m in backbone.pipe.transformer.modules())  # noqa: E731
    plain, plan = backbone.predict_x0(X, 749, PROMPTS), tiny_plan(pipeline_folder)
    DiTCtrl().sample(backbone, plan, randn(11, 4, 2, 4), rng())
    assert hooks() == 0 and torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)

    def stop(step, t, x0, x):
        assert hooks() == 2 and torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)  # as a preview would
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DiTCtrl().sample(backbone, plan, randn(11, 4, 2, 4), rng(), stop)
    with pytest.raises(ValueError, match="encoded"), pair_predictor(backbone, 1 / 6) as predict_pairs:
        try:
            predict_pairs(X, 749, ["unknown"] * 4)
        finally:
            assert torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)
    assert hooks() == 0 and torch.equal(backbone.predict_x0(X, 749, PROMPTS), plain)


@pytest.mark.parametrize("pipeline_folder", ["sincos"], indirect=True)
def test_batches_and_processes_keep_pairs_together(backbone, pipeline_folder, tmp_path):
    results, counted = {}, []
    for size in (1, 2, 5):
        plan = tiny_plan(pipeline_folder)
        plan = Plan(replace(plan.recipe, window_batch=size), plan.texts)
        results[size] = DiTCtrl(sde=True).sample(backbone, plan, randn(11, 4, 2, 4), rng(), done=counted.append)
        assert sum(counted) == DiTCtrl().evaluations(plan, 4) == 18
        counted.clear()
    assert maxdiff(results[1], results[2]) < 1e-5 and maxdiff(results[1], results[5]) < 1e-5

    def work(rank):
        plan = Plan(replace(tiny_plan(pipeline_folder).recipe, window_batch=1), ("it runs", "it jumps"))
        assert torch.equal(DiTCtrl(sde=True).sample(backbone, plan, randn(11, 4, 2, 4), rng()), results[1])

    assert run_processes(work, 2, tmp_path) == [0, 0]


# --------------------------------------------------------------------------------------------------
# Plans and the command line


def story(events, **change):
    return Plan(replace(COGVIDEOX_2B, **change), tuple("abcdefgh"[:events]))


def test_evaluations():
    assert DiTCtrl().evaluations(story(4), 50) == 684 and DiTCtrl(sharing=(-1, 1000)).evaluations(story(4), 50) == 900
    assert DiTCtrl().evaluations(story(4, num_inference_steps=25), 25) == 346
    plan = story(4, stride=7, num_frames=217)  # the published paper's overlap
    assert len(plan.windows) == 7 and DiTCtrl(transitions=1).evaluations(plan, 50) == 465
    shared = lambda steps: [i for i, level in enumerate(LEVELS[steps]) if DiTCtrl().shares(level)]  # noqa: E731
    assert shared(50) == [*range(2, 25)] and shared(25) == [*range(1, 13)]


def test_lengths_that_fit():
    for events, frames in ((2, 97), (3, 145), (4, 193), (5, 241)):
        DiTCtrl().check(story(events, num_frames=frames))
        with pytest.raises(ValueError, match=f"--num_frames {frames} "):
            DiTCtrl().check(story(events, num_frames=289))
    for events, frames in ((2, 105), (3, 161), (4, 217), (5, 273)):
        DiTCtrl(transitions=1).check(story(events, num_frames=frames, stride=7))
    with pytest.raises(ValueError, match="another --stride"):
        DiTCtrl().check(story(4, stride=7))
    with pytest.raises(ValueError, match="only one"):
        DiTCtrl().check(story(1, num_frames=49))
    with pytest.raises(ValueError, match="the same time"):
        DiTCtrl().check(replace(story(4), durations=(3, 2, 2, 3)))


def test_events_meet_where_the_texts_are_half_mixed():
    stops = [stop for _, stop in DiTCtrl().spans(story(4))]  # windows 0, 3, 6 and 9 of 10 have unmixed texts
    assert stops == pytest.approx([12.5 / 49, 24.5 / 49, 36.5 / 49, 1])


def test_refusals(backbone):
    for recipe in RECIPES.values():
        if not issubclass(recipe.backbone, CogVideoX):
            with pytest.raises(ValueError, match="CogVideoX"):
                DiTCtrl().check(Plan(recipe, ("a", "b")))
    with pytest.raises(ValueError, match="pairs"), pair_predictor(backbone, 1 / 6) as predict_pairs:
        predict_pairs(X[:3], 749, PROMPTS[:3])
    with pytest.raises(ValueError, match="10 windows and 4 texts"):
        run(Gaussian(LEVELS[12]), LEVELS[12], texts=["0"] * 4)


def test_demo(any_method, tmp_path, capsys):
    """Compared with another method; stopped and resumed, it makes the same video."""
    words = [*any_method, "--num_frames", 41, "--compare", "ditctrl", "ditctrl-sde", "gen-l-video", "--save_latents"]
    call(*words)
    captured = capsys.readouterr()
    assert "ditctrl: 18 model evaluations (windows); keys and values shared in 1 steps" in captured.out
    assert "18/18" in captured.err and (tmp_path / "video.png").exists()
    latents, _ = read_tensors(tmp_path / "video.safetensors", "latents")
    assert latents["ditctrl"].shape == (11, 4, 2, 4)
    assert min(maxdiff(latents["ditctrl"], latents[name]) for name in ("ditctrl-sde", "gen-l-video")) > 1e-2
    with pytest.raises(SystemExit):
        call(*any_method, "--method", "ditctrl")
    assert "--num_frames 41" in capsys.readouterr().err
