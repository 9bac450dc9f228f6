"""The tiny world and its checkpoint: the renderer, the fit that reads it back, and the model that was trained on it."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

import world as W
from backbones import RECIPES, get_recipe
from reproduce import (
    SEEDS,
    TABLES,
    Exact,
    TinyModel,
    compare,
    consistency_of,
    long_video,
    read_change,
    syncos_fading,
    verdict,
)
from syncos import implied_noise, make_windows, revert, syncos

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tiny" / "checkpoint"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def backbone():
    recipe = get_recipe("tiny")
    return recipe.backbone(recipe.model)


def test_the_fit_reads_the_renderer_back():
    """Clips with noise of 5 %: story and motion are found again."""
    stories = W.sample_stories(12, rng(1))
    motion = W.sample_motion(stories, rng(2))
    video = W.render(stories, motion)
    assert video.min() >= 0 and video.max() <= 1
    fitter = W.Fitter()
    for story, moved, clip in zip(stories.tolist(), motion, video):
        noisy = (clip[::4] + 0.05 * torch.randn(clip[::4].shape, generator=rng())).clamp(0, 1)
        found, fitted = fitter(noisy)
        assert found == tuple(story)
        assert (fitted - moved[::4]).abs().mean() < 0.04
        assert (fitter.refine(noisy, found, fitted) - moved[::4]).abs().mean() < 0.004


def test_the_refined_fit_of_a_clean_clip_is_its_motion():
    stories = W.sample_stories(4, rng(1))
    motion = W.sample_motion(stories, rng(2))[:, ::8]
    fitter = W.Fitter()
    for story, moved, clip in zip(stories.tolist(), motion, W.render(stories, motion)):
        assert (fitter.refine(clip, story, fitter(clip)[1]) - moved).abs().max() < 0.002


def test_objects_stay_in_the_picture_and_actions_are_what_they_say():
    stories = W.sample_stories(400, rng())
    motion = W.sample_motion(stories, rng())
    x, y, s = motion.unbind(-1)
    side = W.WIDEST * W.RADIUS * s
    assert (x - side > -1e-6).all() and (x + side < 1 + 1e-6).all() and (y < W.GROUND).all()
    for action, value in enumerate([x, -x, None, s, -s]):
        if value is not None:
            mine = value[stories[:, 3] == action]
            assert (mine[:, -1] - mine[:, 0] > 0.2).all() and (mine.diff(dim=1) > -1e-6).all()
    hop = (W.GROUND - W.RADIUS * s - y)[stories[:, 3] == 2]
    assert (hop.amax(1) > 0.15).all() and (hop >= -1e-6).all()


def test_captions_leave_out_what_they_are_told_to():
    story = [0, 0, 1, 2]
    assert W.caption(story) == "A red ball in the desert. It jumps."
    assert W.caption(story, color=False) == "A ball in the desert. It jumps."
    assert W.caption(story, background=False) == "A red ball. It jumps."
    assert W.caption(story, subject=False) == "It jumps."
    words = set(" ".join(W.caption(s) for s in W.sample_stories(500, rng())).lower().replace(".", " . ").split())
    assert words == set(W.vocabulary())


def test_checkpoint_is_a_complete_small_pipeline():
    files = [p for p in CHECKPOINT.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(v.numel() for p in files if p.suffix == ".safetensors" for v in load_file(p).values()) > 3e6
    pipe = CogVideoXPipeline.from_pretrained(CHECKPOINT)
    assert all(f"{w}" in pipe.tokenizer.get_vocab() for w in W.vocabulary())
    result = pipe(
        "A red ball in the desert. It jumps.", num_inference_steps=2, max_sequence_length=16, output_type="np"
    )
    assert result.frames[0].shape == (49, 64, 64, 3)


def test_recipe_is_the_checkpoints(backbone):
    measured = get_recipe("tiny")
    written = RECIPES["tiny"]
    assert (measured.window, measured.latent) == (written.window, written.latent)
    own = backbone.scheduler
    assert all(own[k] == v for k, v in written.scheduler.items())


def test_decoding_is_the_pipelines():
    """Other convolutions, streamed: what diffusers' own decoder gives."""
    recipe = get_recipe("tiny")
    tiny = recipe.backbone(recipe.model)
    tiny.load(decoder_only=True)
    latents = torch.randn(5, 8, 8, 8, generator=rng())
    ours = torch.stack([torch.from_numpy(frame) for frame in tiny.decode(latents)])
    pipe = CogVideoXPipeline.from_pretrained(CHECKPOINT, transformer=None, text_encoder=None, tokenizer=None)
    with torch.no_grad():
        theirs = (pipe.decode_latents(latents[None])[0] / 2 + 0.5).clamp(0, 1).mul(255).round()
    assert (ours.permute(3, 0, 1, 2) - theirs).abs().max() <= 1  # a rounding at a uint8 border


def test_unknown_words_get_one_warning(backbone):
    with pytest.warns(UserWarning) as caught:
        backbone.encode(["A red dragon. It flies.", "A Red BALL. It flies."])
    [text] = [text for each in caught if "does not know" in (text := str(each.message))]  # libraries may warn beside
    assert "does not know dragon, flies;" in text and "it knows" in text and "meadow" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.encode(["A Red BALL. It jumps."])


def test_single_clips_show_what_they_are_told_to():
    """Four clips in 20 steps (measure/reproduce.py does 200 in 50); one mistake of the sixteen is forgiven."""
    stories = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    captions = [W.caption(s) for s in stories]
    model = TinyModel(str(CHECKPOINT), "float32")
    model.encode(captions)
    levels = model.levels(20)
    x = torch.randn(4, 13, 8, 8, 8, generator=rng())
    for level, prev in zip(levels, levels[1:]):
        x0 = model.predict_x0(x, level.t, captions)
        x = revert(x0, implied_noise(x, x0, level), prev)
    found = [model.read(z, [slice(0, 13)])["fits"][0] for z in x]
    assert (torch.tensor(found) == stories).sum() >= 15


def test_what_is_read_of_a_video_sees_smears_blur_noise_and_a_change_of_place(monkeypatch):
    """A rendered video of two windows, and the same spoilt in known ways."""
    windows, frames = [slice(0, 13), slice(4, 17)], 65
    x = torch.linspace(0.25, 0.75, frames)
    motion = torch.stack([x, torch.full_like(x, W.GROUND - W.RADIUS), torch.ones_like(x)], -1)
    here, there = (W.render(torch.tensor([[0, 1, place, 0]]), motion[None])[0] for place in (1, 2))
    model = object.__new__(TinyModel)
    model.fitter = W.Fitter()

    def read(video):
        monkeypatch.setattr(model, "video", lambda latents: video.clamp(0, 1), raising=False)
        return model.read(None, windows)

    clean = read(here)
    assert clean["fits"] == [(0, 1, 1, 0)] * 2 and clean["sharpness"] == pytest.approx(1, abs=0.01)
    assert len(clean["frames"]) == 17 and max(clean["frames"]) < 1e-4
    smeared = here.clone()
    smeared[21:25] = (here[21:25] + here[:4]) / 2  # latent frame 6
    smear = read(smeared)["frames"]
    assert max(smear) == smear[6] > 30 * sorted(smear)[-2]
    blurred = torch.nn.functional.avg_pool2d(here, 3, 1, 1, count_include_pad=False)
    assert read(blurred)["sharpness"] < 0.7
    noisy = read(here + 0.1 * torch.randn(here.shape, generator=rng()))
    assert noisy["fits"] == clean["fits"] and noisy["pictures"] < clean["pictures"] - 0.05  # the fits see through it
    moved = read(torch.cat([here[:33], there[33:]]))
    assert moved["pictures"] < clean["pictures"] - 0.1 and moved["fits"][1][2] == 2


def test_exact_denoiser_is_the_posterior_mean_and_reads_its_clips_back():
    model, prompts = Exact(), ["A star. It jumps.", "A star. It grows."]
    level = model.levels(50)[25]
    model.encode(prompts)
    clips = torch.stack([model.clips[prompts[0]][137], model.clips[prompts[1]][488]]).view(2, 13, 3, 8, 8)
    x = level.alpha * clips + level.sigma * torch.randn(clips.shape, generator=rng())
    for got, noisy, prompt in zip(model.predict_x0(x, level.t, prompts), x.double(), prompts):
        data = model.clips[prompt].double().view(-1, 13, 3, 8, 8)
        likelihood = -(noisy - level.alpha * data).square().sum((1, 2, 3, 4)) / (2 * level.sigma**2)
        weights = likelihood.softmax(0)
        assert (got - (weights.view(-1, 1, 1, 1, 1) * data).sum(0)).abs().max() < 1e-3
    seen = model.read(clips.flatten(0, 1), [slice(0, 13), slice(13, 26)])
    assert seen["fits"] == [(3, 137 // 100, 137 // 25 % 4, 2), (3, 488 // 100, 488 // 25 % 4, 3)]
    assert seen["distance"] < 1e-10 and seen["motion"] > 0


def test_long_videos_are_measured_once(monkeypatch):
    kept = {}
    values = long_video(Exact(), 0, dict(csd_iters=2), kept, kept.__setitem__)
    assert len(kept) == 1 and values["evaluations"] == 250 + 17 * 2 * 4
    monkeypatch.setattr("reproduce.syncos", None)
    assert long_video(Exact(), 0, dict(csd_iters=2), kept, None) == values


def test_consistency_of_what_windows_show():
    """By hand: each window but the first, compared with the one before and with the first."""
    assert consistency_of([2, 2, 2]) == 1
    assert consistency_of([(3, 1), (3, 1), (3, 2), (3, 2), (3, 1)]) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)


def test_fifo_is_measured_beside_the_others(monkeypatch):
    """Its evaluations; the exact denoiser with every frame at its own level, against naive loops."""
    model, prompts = Exact(), ["A star. It jumps."]
    model.encode(prompts)
    levels = model.levels(50)
    at = [levels[k] for k in range(10, 49, 3)]
    x, clips = torch.randn(1, 13, 3, 8, 8, generator=rng()), model.clips[prompts[0]].double().view(-1, 13, 3, 8, 8)
    logits = torch.stack(
        [
            sum(-((x[0, k].double() - a * clip[k]) ** 2).sum() / (2 * s**2) for k, (_, a, s) in enumerate(at))
            for clip in clips
        ]
    )
    expected = (logits.softmax(0).view(-1, 1, 1, 1, 1) * clips).sum(0)
    got = model.predict_x0(x, torch.tensor([[level.t for level in at]]), prompts)[0]
    assert (got - expected).abs().max() < 1e-3

    kept = {}
    values = long_video(Exact(), 0, read_change("fifo") | dict(steps=13), kept, kept.__setitem__)
    assert values["evaluations"] == 13 + 49 * 2  # two windows of 13 over 6 frames of context and 13 of queue
    assert 0 <= values["structure flicker"] <= 9 and 0 <= values["at joins"] <= 1
    monkeypatch.setattr("reproduce.fifo", None)
    assert long_video(Exact(), 0, dict(fifo={}, steps=13), kept, None) == values


def test_a_fading_learning_rate_is_sigma_times_the_settings():
    """Where stage 2 runs in one step it is plain SynCoS with that step's rate."""
    model, prompts = Exact(), ["A star. It jumps."] * 3
    model.encode(prompts)
    levels, windows = model.levels(6), make_windows(21, 13, 4)
    settings = replace(model.recipe.settings, t_min=levels[2].t, csd_iters=2)
    run = lambda method, settings: method(  # noqa: E731
        model.predict_x0, torch.randn(21, 3, 8, 8, generator=rng()), levels, windows, prompts, settings, rng()
    )
    expected = run(syncos, replace(settings, csd_lr=settings.csd_lr * levels[1].sigma))
    assert torch.equal(run(syncos_fading, settings), expected)
    assert not torch.equal(run(syncos, settings), expected)


BAD_SETTINGS = ["gen_l_video", '{"t_min": 300', '{"t_mim": 300}', '{"csd_iters": 0}', '{"fifo": {"eta": 2}}', "[1]"]


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_settings_to_measure_are_checked_first(text):
    assert read_change("gen-l-video")["refine"] is False and read_change('{"steps": 9}') == dict(steps=9)
    with pytest.raises(ValueError, match="neither one of syncos, gen-l-video, csd, fifo nor settings as JSON: "):
        read_change(text)


def test_a_verdict_needs_an_interval_on_one_side():
    assert verdict([-0.3, -0.2, -0.4, -0.3], papers=-7.6) == "reproduced"
    assert verdict([0.3, 0.2, 0.4, 0.3], papers=-7.6) == "not reproduced"
    assert verdict([-0.3, 0.2, 0.4, -0.3], papers=-7.6) == "not distinguishable"
    assert verdict([0.0, 0.0], papers=-7.6) == "not distinguishable"


def test_tables_compare_scenario_by_scenario(capsys):
    """Two rows, three scenarios, two steps: the printed means and differences are those of `long_video`; what is shown
    stands in the first two tables, the pictures in the others."""
    done, few = {}, dict(steps=2, csd_iters=1)
    rows = {name: (TABLES[name][0] | few, TABLES[name][1]) for name in ("SynCoS", "Gen-L-Video")}
    compare(Exact(), range(3), rows, done, done.__setitem__)
    text = capsys.readouterr().out
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
              for block in text.split("\n\n") if block.startswith("|")]  # fmt: skip
    shown, shown_minus, pictures, pictures_minus = tables
    a, b = ([long_video(Exact(), seed, rows[name][0], done, None)["distance x 1000"] for seed in range(3)]
            for name in rows)  # fmt: skip
    column = pictures[0].index("distance x 1000")
    mean = lambda row: float(row[column].split(" ")[0])  # noqa: E731
    assert [row[0] for row in pictures[2:]] == list(rows) == [row[0] for row in shown[2:]]
    assert mean(pictures[2]) == pytest.approx(sum(a) / 3, abs=0.006)
    assert mean(pictures[3]) == pytest.approx(sum(b) / 3, abs=0.006)
    assert mean(pictures_minus[2]) == pytest.approx((sum(b) - sum(a)) / 3, abs=0.006)
    assert "(paper: 0.813 - 0.889) *" in shown_minus[2][1] and "reproduced" not in " ".join(pictures_minus[2])


def test_the_tables_on_the_page_are_of_the_results_beside_it(capsys):
    folder = ROOT / "measure"
    done = dict(map(json.loads, (folder / "tables.jsonl").read_text().splitlines()))
    compare(TinyModel(str(CHECKPOINT), "float32"), range(*SEEDS["tables"]), TABLES, done, None)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and line[2] != "|"]
    page = (folder / "README.md").read_text().splitlines()
    assert len(rows) == 2 * len(TABLES) + 2 * (len(TABLES) - 1) and not [row for row in rows if row not in page]


def test_training_goes_on_where_it_stopped_and_writes_a_pipeline(tmp_path):
    command = [sys.executable, ROOT / "tiny" / "train.py", "--clips", "8", "--work", tmp_path / "work"]
    command += ["--output", tmp_path / "checkpoint", "--steps", "2", "--own_clips", "0", "--vae_steps"]
    for steps in (1, 2):
        subprocess.run([*command, str(steps)], check=True, capture_output=True)
        assert torch.load(tmp_path / "work" / "vae.pt", weights_only=True)["step"] == steps
    pipe = CogVideoXPipeline.from_pretrained(tmp_path / "checkpoint")
    assert pipe.vae.config.scaling_factor != 1.0 and pipe.transformer.config.sample_frames == 49


def test_training_goes_on_from_a_checkpoint_and_ends_with_clips_of_its_own(tmp_path):
    command = [sys.executable, ROOT / "tiny" / "train.py", "--init", CHECKPOINT, "--clips", "8", "--steps", "1"]
    command += ["--own_clips", "8", "--own_steps", "2", "--decoder_steps", "1"]
    subprocess.run([*command, "--work", tmp_path, "--output", tmp_path / "checkpoint"], check=True, capture_output=True)
    own = sum(torch.load(tmp_path / "own.pt", weights_only=True), [])
    assert len(own) == 8  # all are right
    for latents, clean, *_ in own:  # and their fits' latents are near: the scale is the same
        assert (latents - clean).square().mean() < 0.05 * clean.square().mean()
    assert torch.load(tmp_path / "decoder.pt", weights_only=True)["step"] == 1


def own_clips(n: int) -> tuple[torch.Tensor, ...]:
    """As `train.own_clips` has them, of noise."""
    generator = rng()
    latents, clean = torch.randn(2, n, 13, 8, 8, 8, generator=generator)
    stories = W.sample_stories(n, generator)
    return latents, clean, stories, W.sample_motion(stories, generator), torch.ones(n, 13, 1, 8, 8)


def test_training_aims_at_the_schedulers_v():
    """And where the clip is not the one to be seen, at the v that leads to that one."""
    import train

    class Zero:
        device = torch.device("cpu")

        def __call__(self, x, *args, **kwargs):
            self.noised = x
            return (torch.zeros_like(x),)

    scheduler, transformer, t = train.make_scheduler(), Zero(), torch.tensor([3, 400, 998])
    x, other, stories, _, _ = own_clips(3)
    models = transformer, lambda ids: [None], train.make_tokenizer(), scheduler
    error, sigma = train.error_of_v(models, x, x, stories, t, rng())
    alpha = scheduler.alphas_cumprod[t].float().sqrt().view(sigma.shape)
    noise = (transformer.noised - alpha * x) / sigma
    torch.testing.assert_close(-error, scheduler.get_velocity(x, noise, t), atol=1e-4, rtol=1e-4)
    error, sigma = train.error_of_v(models, x, other, stories, t, rng())
    torch.testing.assert_close(alpha * transformer.noised + sigma * error, other, atol=1e-5, rtol=1e-5)


def test_the_transformer_learns_to_mend_its_own_clips(tmp_path):
    import train

    torch.manual_seed(0)
    x, _, stories, motions, masks = own_clips(1)
    own = torch.ones_like(x), torch.zeros_like(x), stories, motions, masks
    config = dict(train.make_transformer().config, num_layers=1, num_attention_heads=2)
    transformer = type(train.make_transformer()).from_config(config)
    models = transformer, train.make_text_encoder().eval(), train.make_tokenizer(), train.make_scheduler()

    @torch.no_grad()
    def error():
        error, sigma = train.error_of_v(models, *own[:3], torch.tensor([300]), rng())
        return (sigma * error).square().mean().item()

    before = error()
    train.tune_transformer(models, (-own[0], stories, masks), own, 150, tmp_path)
    assert error() < 0.5 * before
    assert torch.load(tmp_path / "mending.pt", weights_only=True)["step"] == 150


def test_the_decoder_alone_is_tuned(tmp_path):
    """On clips of its own and of the world; the encoder stays."""
    import train

    vae = train.make_vae().eval().requires_grad_(False)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    train.tune_decoder(vae, own_clips(2), 2, tmp_path)
    changed = {k for k, v in vae.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("decoder.") for k in changed)
    assert torch.load(tmp_path / "decoder.pt", weights_only=True)["step"] == 2
