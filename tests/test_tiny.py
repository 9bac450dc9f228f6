"""The tiny world: the renderer, the fit that reads it back, training, and the reproduction."""

import json
import math
import re
import sys
import warnings
from copy import copy
from dataclasses import replace
from pathlib import Path
from statistics import correlation, linear_regression

import pytest
import torch
from diffusers import CogVideoXPipeline, UNet3DConditionModel
from helpers import maxdiff, randn, rng
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from extras.baselines import Plan
from extras.methods import SynCoS
from extras.models import get_recipe
from extras.models.tiny import TINY, TINY_UNET, time_as_rows
from extras.models.videocrafter2 import SCHEDULER, VideoCrafter2
from extras.tiny import train, unet
from extras.tiny import world as W
from extras.tiny.fit import Muon
from syncos import GEN_L_VIDEO, implied_noise, revert, syncos_step

for package in ("scenedetect", "cv2", "matplotlib"):
    pytest.importorskip(package, reason="the reproduction needs extras/requirements.txt")

from extras.measure import plots  # noqa: E402
from extras.measure import reproduce as R  # noqa: E402

CHECKPOINT, PAGE = Path(TINY.model), Path(R.__file__).parent / "README.md"


@pytest.fixture(scope="module")
def tiny():
    return R.TinyModel(TINY.model, "float32")


@pytest.fixture(scope="module")
def tiny_unet():
    return R.TinyModel(TINY_UNET.model, "float32", "tiny-unet")


@pytest.fixture
def cheap(tiny):
    """A model whose network is trivial, and whose videos are read from the latents alone."""
    model, model.backbone = (model := copy(tiny)), copy(tiny.backbone)
    model.backbone.denoise = lambda x, t, *text: x / 2
    model.read = lambda latents, windows: dict(
        fits=[(0, i % 2, 1, 2) for i in range(len(windows))], frames=latents.square().mean((1, 2, 3)).tolist(), motion=1
    )
    return model


# --------------------------------------------------------------------------------------------------
# The world


def test_the_fit_reads_the_renderer_back():
    """Story and motion of clips are found again, without noise and with 5 % of it."""
    stories = W.sample_stories(12, rng(1))
    motion = W.sample_motion(stories, rng(2))
    video, fitter = W.render(stories, motion), W.Fitter()
    assert video.min() >= 0 and video.max() <= 1
    for n, (story, moved, clip) in enumerate(zip(stories.tolist(), motion[:, ::4], video[:, ::4])):
        noisy = (clip + 0.05 * randn(*clip.shape)).clamp(0, 1)
        found, fitted = fitter(noisy)
        assert found == tuple(story) and (fitted - moved).abs().mean() < 0.04
        assert (fitter.refine(noisy, found, fitted) - moved).abs().mean() < 0.004
        if n < 4:
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


# --------------------------------------------------------------------------------------------------
# The checkpoint


def test_checkpoint_is_a_complete_small_pipeline_and_has_a_recipe(tiny):
    files = [p for p in CHECKPOINT.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(v.numel() for p in files if p.suffix == ".safetensors" for v in load_file(p).values()) > 3e6
    pipe = CogVideoXPipeline.from_pretrained(CHECKPOINT)
    assert set(W.vocabulary()) <= set(pipe.tokenizer.get_vocab())
    options = dict(num_inference_steps=2, max_sequence_length=16, output_type="np")
    assert pipe("A red ball in the desert. It jumps.", **options).frames[0].shape == (49, 64, 64, 3)
    measured = get_recipe("tiny")
    assert (measured.window, measured.latent) == (TINY.window, TINY.latent)
    assert all(tiny.backbone.scheduler[k] == v for k, v in TINY.scheduler.items())


def test_decoding_is_the_pipelines(tiny):
    """Although it streams, with other convolutions, it returns what diffusers' decoder returns."""
    latents = randn(5, 8, 8, 8)
    ours = torch.stack([torch.from_numpy(frame) for frame in tiny.backbone.decode(latents)])
    pipe = CogVideoXPipeline.from_pretrained(CHECKPOINT, transformer=None, text_encoder=None, tokenizer=None)
    with torch.no_grad():
        theirs = (pipe.decode_latents(latents[None])[0] / 2 + 0.5).clamp(0, 1).mul(255).round()
    assert (ours.permute(3, 0, 1, 2) - theirs).abs().max() <= 1  # a rounding at a uint8 border


def test_the_unets_checkpoint_is_complete_and_small(tiny_unet):
    files = [p for p in Path(TINY_UNET.model).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12e6
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    assert set(W.vocabulary()) <= set(tiny_unet.backbone.load_pipe("tokenizer").tokenizer.get_vocab())
    assert (TINY_UNET.window, TINY_UNET.num_frames) == (16, 64)
    with pytest.raises(ValueError, match="64 x 64 pixels and 16 frames only"):
        TINY_UNET.backbone.resize(TINY_UNET, 64, 64, 16)


@pytest.mark.parametrize("model", ["tiny", "tiny_unet"])
def test_unknown_words_get_one_warning(model, request):
    tiny = request.getfixturevalue(model)
    with pytest.warns(UserWarning) as caught:
        tiny.backbone.encode(["A red dragon. It flies.", "A Red BALL. It flies."])
    [text] = [text for each in caught if "does not know" in (text := str(each.message))]  # libraries may warn beside
    assert "dragon, flies;" in text and "meadow" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.backbone.encode(["A Red BALL. It jumps."])


@pytest.mark.parametrize("model", ["tiny", "tiny_unet"])
def test_single_clips_show_what_they_are_told_to(model, request):
    """Four clips in 20 steps (reproduce.py: 200 in 50); one of sixteen attributes may be wrong."""
    tiny, stories = request.getfixturevalue(model), torch.arange(4)[:, None].expand(4, 4)
    captions = [W.caption(s) for s in stories]
    tiny.backbone.encode(captions)
    levels, x = tiny.backbone.levels(20), randn(4, tiny.recipe.window, *tiny.recipe.latent)
    for level, prev in zip(levels, levels[1:]):
        x0 = tiny.backbone.predict_x0(x, level.t, captions)
        x = revert(x0, implied_noise(x, x0, level), prev)
    found = [tiny.read(z, [slice(0, tiny.recipe.window)])["fits"][0] for z in x]
    assert (torch.tensor(found) == stories).sum() >= 15


# --------------------------------------------------------------------------------------------------
# The reproduction


def test_what_is_read_of_a_video_sees_smears_blur_noise_and_a_change_of_place(tiny):
    """A rendered video of two windows, spoilt in known ways."""
    windows, frames = [slice(0, 13), slice(4, 17)], 65
    x = torch.linspace(0.25, 0.75, frames)
    motion = torch.stack([x, torch.full_like(x, W.GROUND - W.RADIUS), torch.ones_like(x)], -1)
    here, there = (W.render(torch.tensor([[0, 1, place, 0]]), motion[None])[0] for place in (1, 2))
    model = copy(tiny)

    def read(video):
        model.video = lambda latents: video.clamp(0, 1)
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
    noisy = read(here + 0.1 * randn(*here.shape))
    assert noisy["fits"] == clean["fits"] and noisy["pictures"] < clean["pictures"] - 0.05  # the fits see through it
    moved = read(torch.cat([here[:33], there[33:]]))
    assert moved["pictures"] < clean["pictures"] - 0.1 and moved["fits"][1][2] == 2
    for seen in (clean, noisy, moved):
        assert (torch.tensor(seen["colors"]) - W.PALETTE[1]).abs().max() < 0.02
    tinted = here.clone()
    tinted[17:] *= 1 - 0.2 * W.masks(0, motion)[0][17:, None]  # a darker object, still nearest to the same name
    assert read(tinted)["fits"][1][:3] == (0, 1, 1) and math.dist(*read(tinted)["colors"]) > 0.05


def test_a_model_without_temporal_compression_is_read_frame_by_frame(tiny_unet):
    """A rendered video of two windows of 16 frames; Video-Infinity's plan is its own clips."""
    x = torch.linspace(0.25, 0.75, 24)
    motion = torch.stack([x, torch.full_like(x, W.GROUND - W.RADIUS), torch.ones_like(x)], -1)
    model = copy(tiny_unet)
    model.video = lambda latents: W.render(torch.tensor([[0, 1, 1, 0]]), motion[None])[0]
    seen = model.read(None, [slice(0, 16), slice(8, 24)])
    assert seen["fits"] == [(0, 1, 1, 0)] * 2 and len(seen["frames"]) == 24 and max(seen["frames"]) < 1e-4
    plan, _ = R.make_video(tiny_unet, 0, R.TABLES_UNET["Video-Infinity"][0])
    assert plan.windows == [slice(k, k + 16) for k in (0, 16, 32, 48)] and plan.events == [0, 1, 2, 3]


@pytest.mark.parametrize("change, count", [
    (dict(csd_iters=2), 250 + 17 * 2 * 4),
    (dict(method="gen-l-video"), 250),
    (dict(method="fifo", steps=13), 13 + 49 * 2),  # two windows of 13 over 6 frames of context and 13 of queue
    (dict(fading=True, structured=False, steps=4), 4 * 10 + 2 * 5 * 4),
    (dict(events=1), 250 + 17 * 5 * 4),
    (dict(first=[2, dict(refine=False)], csd_iters=2), 250 + 16 * 2 * 4),  # the first step has no signal
])  # fmt: skip
def test_long_videos_are_measured_once(cheap, change, count):
    kept = {}
    values = R.long_video(cheap, 0, change, kept, kept.__setitem__)
    assert len(kept) == 1 and values["evaluations"] == count and values["identities"] == 2
    assert 0 <= values["structure flicker"] <= 9 and 0 <= values["local fidelity"] <= 1
    assert math.isnan(values["at joins"]) == ("events" in change)  # one event joins no other
    cheap.read = cheap.backbone.denoise = None
    assert str(R.long_video(cheap, 0, change, kept, None)) == str(values)  # as nan is not equal to itself


def test_a_colour_drifts_within_its_name(cheap):
    """Three windows: two alike, and one 0.3 away in green; pairs 0, 0.3 and 0.3."""
    read = cheap.read
    cheap.read = lambda latents, windows: read(latents, windows) | dict(colors=[(1, 0, 0)] * 2 + [(1, 0.3, 0)])
    assert R.long_video(cheap, 0, dict(steps=1), kept := {}, kept.__setitem__)["colour drift"] == pytest.approx(0.2)


def test_who_chooses_the_look_of_a_clip(cheap, capsys, monkeypatch):
    """By hand, with a fit that takes the colour from the noise and the place from the prompt."""
    captions = [f"A ball. {action}" for action in W.ACTIONS.values()]
    noises = []

    def clips(model, noise, prompts, steps):
        assert prompts == captions and all(torch.equal(noise[0], x) for x in noise) and steps == 25
        noises.append(noise[0])
        return [(len(noises), n) for n in range(len(prompts))]

    monkeypatch.setattr(R, "sample_clips", clips)
    cheap.fitter = lambda video: ((0, *video, 0), None)
    R.looks(cheap, 15, kept := {}, kept.__setitem__)
    assert len(kept) == 3 and not torch.equal(noises[0], noises[1])
    colour, place = capsys.readouterr().out.splitlines()
    assert colour == "same colour: 1.00 [1.00, 1.00] with the same noise, 0.00 [0.00, 0.00] with the same prompt"
    assert place == "same place: 0.00 [0.00, 0.00] with the same noise, 1.00 [1.00, 1.00] with the same prompt"


def test_methods_start_from_shared_noise_if_the_recipe_shares_it(tiny_unet):
    plan, own = (R.make_video(tiny_unet, 0, change)[0] for change in ({}, R.OWN))
    noise = own.noise(rng())
    assert torch.equal(noise, randn(64, 4, 8, 8)) and not torch.equal(noise, plan.noise(rng()))
    for window in plan.windows:
        assert sorted(plan.noise(rng())[window].flatten()) == sorted(noise[:16].flatten())


def test_results_are_kept_apart_by_guidance(tiny):
    other = R.TinyModel(TINY.model, "float32", guidance_scale=0)
    assert other.backbone.guidance_scale == 0 and other.name != tiny.name


def test_consistency_of_what_windows_show():
    """By hand: each window but the first, compared with the one before and with the first."""
    assert R.consistency_of([2, 2, 2]) == 1
    assert R.consistency_of([(3, 1), (3, 1), (3, 2), (3, 2), (3, 1)]) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)


def test_the_first_steps_can_have_settings_of_their_own(cheap):
    """Two steps by Gen-L-Video and the rest by SynCoS, in turn by hand."""
    plan, method = R.make_video(cheap, 0, dict(steps=5, first=[2, GEN_L_VIDEO]))
    cheap.backbone.encode(plan.texts), cheap.backbone.set_levels(plan.levels)
    prompts, generator, x = [plan.texts[event] for event in plan.events], rng(1), randn(49, 8, 8, 8)
    got = method.sample(cheap.backbone, plan, x, rng(1))
    x0 = x
    for step in range(5):
        settings = replace(TINY.settings, **GEN_L_VIDEO) if step < 2 else TINY.settings
        rest = (step, plan.levels, plan.windows, prompts, settings, generator)
        x0, x = syncos_step(cheap.backbone.predict_x0, x, x0, *rest, at_once=10)
    assert torch.equal(got, x)


def test_a_fading_learning_rate_is_sigma_times_the_settings(cheap):
    """Where stage 2 runs in one step it is plain SynCoS with that step's rate."""
    levels = cheap.backbone.levels(6)
    settings = replace(TINY.settings, t_min=levels[2].t, csd_iters=2)
    plan = Plan(replace(TINY, num_frames=81, num_inference_steps=6, settings=settings), ("A star. It jumps.",))
    cheap.backbone.encode(plan.texts)
    sample = lambda method: method.sample(cheap.backbone, plan, randn(21, 8, 8, 8), rng())  # noqa: E731
    faded = sample(R.Varied(settings, fading=True))
    assert torch.equal(faded, sample(SynCoS(replace(settings, csd_lr=settings.csd_lr * levels[1].sigma))))
    assert not torch.equal(faded, sample(SynCoS(settings)))


def test_settings_to_measure_are_checked_first(cheap):
    assert R.read_change("gen-l-video", cheap) == dict(method="gen-l-video")
    assert R.read_change('{"steps": 9}', cheap) == dict(steps=9)
    wrong = ['{"t_mim": 300}', '{"csd_iters": 0}', '{"events": 0}', '{"first": [2, {"t_mim": 300}]}', "[1]"]
    for text in (*wrong, "gen_l_video", '{"method": "fifo", "eta": 2}', '{"method": "csd", "first": [2, {}]}'):
        with pytest.raises(ValueError, match="JSON"):
            R.read_change(text, cheap)


def test_a_verdict_needs_an_interval_on_one_side():
    assert R.verdict([-0.3, -0.2, -0.4, -0.3], papers=-7.6) == "reproduced"
    assert R.verdict([0.3, 0.2, 0.4, 0.3], papers=-7.6) == "not reproduced"
    assert R.verdict([-0.3, 0.2, 0.4, -0.3], papers=-7.6) == "not distinguishable"
    assert R.verdict([0.0, 0.0], papers=-7.6) == "not distinguishable"


def test_tables_compare_scenario_by_scenario(cheap, capsys):
    """The printed means and differences are those of `long_video`; content, then pictures."""
    done, few, seeds, name = {}, dict(steps=2, t_min=300, csd_iters=1), range(3), "distance x 1000"
    rows = {"SynCoS": (few, None), "Gen-L-Video": (dict(method="gen-l-video", steps=2), R.TABLES["Gen-L-Video"][1])}
    R.print_tables(R.measure_rows(cheap, seeds, rows, done, done.__setitem__), rows)
    blocks = [block.splitlines() for block in capsys.readouterr().out.split("\n\n") if block.startswith("|")]
    _, shown, shown_minus, pictures, pictures_minus = ([line.split("|") for line in block] for block in blocks)
    assert [row[1].strip() for row in pictures[2:]] == list(rows) == [row[1].strip() for row in shown[2:]]
    assert "(paper: 0.813 - 0.889) *" in shown_minus[2][2] and "reproduced" not in " ".join(pictures_minus[2])
    column = pictures[0].index(f" {name} ")
    a, b, difference = (float(row[column].split()[0]) for row in (*pictures[2:], pictures_minus[2]))
    expected = [sum(R.long_video(cheap, n, rows[row][0], done, None)[name] for n in seeds) / 3 for row in rows]
    assert [a, b] == pytest.approx(expected, abs=0.006) and abs(difference) > 0.1
    assert difference == pytest.approx(expected[1] - expected[0], abs=0.006)


def kept_videos(model, rows, seeds):
    """The rows on the page, read from tables.jsonl; nothing is sampled."""
    done = dict(map(json.loads, (PAGE.parent / "tables.jsonl").read_text().splitlines()))
    return R.measure_rows(model, range(*seeds), rows, done, None)


@pytest.fixture(scope="module")
def page_videos(tiny):
    return kept_videos(tiny, R.TABLES, R.SEEDS["tables"])


@pytest.mark.parametrize("heading, model, rows, seeds", [
    ("What we found", "tiny", R.TABLES, R.SEEDS["tables"]),
    ("A U-Net that predicts eps", "tiny_unet", R.TABLES_UNET, (110, 140)),
])  # fmt: skip
def test_the_page_quotes_the_tables_beside_it(heading, model, rows, seeds, request, capsys):
    """The printed summary is on the page, and each interval quoted in the section is printed."""
    R.print_tables(kept_videos(request.getfixturevalue(model), rows, seeds), rows)
    printed, page = capsys.readouterr().out, PAGE.read_text()
    summary = printed.split("\n\n")[1]
    assert len(summary.splitlines()) == 2 + len(rows) and summary in page
    section = re.search(rf"^## {heading}\n(.*?)^## ", page, re.MULTILINE | re.DOTALL).group(1)
    quoted = re.findall(r"-?\d+\.\d+\s\[.*?\]", section, re.DOTALL)
    assert quoted and not [figure for figure in quoted if f" {' '.join(figure.split())} " not in printed]


def test_the_page_compares_both_models_on_the_same_stories(tiny, tiny_unet):
    """Its table and the four differences that it quotes, by hand from tables.jsonl."""
    rows, page = {"": ({}, None), ", one event": (dict(events=1), None)}, " ".join(PAGE.read_text().split())
    cogvideox, unet = (kept_videos(model, rows, R.SEEDS["tables"]) for model in (tiny, tiny_unet))
    for row in rows:
        for name, each in (("CogVideoX", cogvideox[row]), ("U-Net", unet[row])):
            means = " | ".join(f"{sum(video[m] for video in each) / 60:.2f}" for m in R.SUMMARY[:4])
            assert f"| {name}{row} | {means} |" in page
        for m in R.SUMMARY[:2]:  # subject and place
            assert R.interval([a[m] - b[m] for a, b in zip(unet[row], cogvideox[row])]) in page


def test_motion_goes_with_picture_consistency_as_the_page_says(page_videos):
    pair = [R.differences(page_videos, "FIFO-Diffusion", m) for m in ("motion x 1000", "picture consistency")]
    at_equal_motion = linear_regression(*pair).intercept
    page = " ".join(PAGE.read_text().split())
    assert f"correlate over the stories ({correlation(*pair):.2f})" in page
    assert f"the fitted line predicts {at_equal_motion:.2f}." in page


def test_the_pictures_on_the_page_are_of_the_tables_beside_it(page_videos):
    """A picture's own numbers are those of the file; every row is in the forest plot."""
    for name, (numbers, _) in plots.PICTURES.items():
        drawn, points = json.loads(Image.open(PAGE.parent / name).text["data"]), numbers(page_videos)
        assert list(drawn) == list(points) and f"]({name})" in PAGE.read_text()
        for row, measure in ((name, measure) for name in points for measure in points[name]):
            got, wanted = drawn[row][measure], points[row][measure]
            assert got[:4] == pytest.approx(wanted[:4], abs=2e-4) and got[4:] == wanted[4:]
    assert {"SynCoS", *plots.forest_points(page_videos)} == set(R.TABLES)


def test_points_of_pictures_by_hand():
    """Differences are paired, the paper's number lies beside; costs and means are the rows'."""
    measures = {*plots.DIFFERENCES, *plots.AGAINST_COST}
    make = lambda values: [dict.fromkeys(measures, v) | dict(evaluations=7) for v in values]  # noqa: E731
    videos = {"SynCoS": make([5.0, 1.0, 9.0]), "Gen-L-Video": make([4.0, 0.0, 8.0])}
    own = plots.forest_points(videos)["Gen-L-Video"]
    assert own["local fidelity"] == [-1, -1, -1, pytest.approx(0.351 - 0.354), "reproduced"]
    assert own["picture consistency"][3:] == [pytest.approx(0.8134 - 0.8892), "reproduced"]
    evaluations, mean, low, high = plots.cost_points(videos)["SynCoS"]["identities"]
    assert (evaluations, mean) == (7, 5) and low < 5 < high
    for draw, numbers in ((plots.draw_forest, plots.forest_points), (plots.draw_cost, plots.cost_points)):
        draw(numbers(videos))


# --------------------------------------------------------------------------------------------------
# Training


@pytest.fixture
def run_training(monkeypatch, tmp_path):
    """`python -m extras.tiny.train words` in `tmp_path`, with small batches."""
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(unet, "BATCH", 16)

    def run(*words):
        words = ["train.py", "--device", "cpu", "--work", tmp_path, "--output", tmp_path / "out", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        train.main()

    return run


def test_training_resumes_where_it_stopped_and_writes_a_pipeline(run_training, tmp_path):
    for steps in (1, 2):
        run_training("--clips", 8, "--steps", 2, "--own_clips", 0, "--vae_steps", steps)
        assert torch.load(tmp_path / "vae.pt", weights_only=True)["step"] == steps
    pipe = CogVideoXPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae.config.scaling_factor != 1.0 and pipe.transformer.config.sample_frames == 49


def test_training_continues_a_checkpoint_and_ends_with_clips_of_its_own(run_training, tmp_path):
    tuning = ["--own_clips", 8, "--own_steps", 2, "--decoder_steps", 2]
    run_training("--init", CHECKPOINT, "--clips", 8, "--steps", 1, *tuning)
    own = sum(torch.load(tmp_path / "own.pt", weights_only=True), [])
    assert len(own) == 8  # all are right
    for latents, clean, *_ in own:  # and their fits' latents are near: the scale is the same
        assert (latents - clean).square().mean() < 0.05 * clean.square().mean()
    assert torch.load(tmp_path / "decoder.pt", weights_only=True)["step"] == 2
    new, old = (load_file(next((folder / "vae").glob("*.safetensors"))) for folder in (tmp_path / "out", CHECKPOINT))
    changed = {k for k in old if not torch.equal(new[k], old[k])}
    assert changed and all(k.startswith("decoder.") for k in changed)  # the encoder stays


def test_the_unets_training_writes_a_folder_that_the_adapter_loads_as_it_is(run_training, tmp_path):
    """Six steps: single frames, runs of 4, clips. The estimate is that of diffusers' U-Net."""
    run_training("--model", "unet", "--clips", 8, "--steps", 6, "--vae_steps", 1)
    backbone = VideoCrafter2(str(tmp_path / "out"), guidance_scale=1.0)
    level = backbone.levels(4)[1]
    backbone.encode([text := "A red ball in the desert. It jumps."])
    backbone.load()
    network = UNet3DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    text_encoder = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder", dtype=torch.float32)
    ids = train.make_tokenizer()(text, padding="max_length", return_tensors="pt").input_ids
    x = randn(1, 16, 4, 8, 8)
    with torch.no_grad():
        eps = network(x.transpose(1, 2), level.t, text_encoder(ids).last_hidden_state).sample.transpose(1, 2)
    expected = (x - level.sigma * eps) / level.alpha
    assert maxdiff(backbone.predict_x0(x, level.t, [text]), expected) < 1e-4
    assert backbone.pipe.vae.config.scaling_factor != 1.0
    assert len(list(backbone.decode(x[0]))) == 16


def test_the_unets_levels_are_the_adapters():
    alphas, sigmas = unet.levels()
    for level in VideoCrafter2.make_levels(SCHEDULER, 50)[:-1]:
        assert (alphas[int(level.t)], sigmas[int(level.t)]) == (pytest.approx(level.alpha), pytest.approx(level.sigma))


def test_an_untrained_unet_returns_its_input_with_unit_spread():
    """Nearly the noise, at high noise."""
    x, text = randn(2, 4, 16, 8, 8), torch.zeros(2, 16, 64)
    with torch.no_grad():
        eps = unet.make_unet()(x, torch.tensor([981, 981]), text).sample
    normed = x / x.std((1, 3, 4), keepdim=True)
    assert torch.nn.functional.cosine_similarity(eps.flatten(), normed.flatten(), 0) > 0.9


def test_temporal_convolutions_train_as_torchs():
    conv, x = torch.nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0)), randn(2, 6, 5, 4, 3)
    y = time_as_rows(conv, x)
    assert y.shape == conv(x).shape and maxdiff(y, conv(x)) < 1e-5
    ours, theirs = (torch.autograd.grad((z**2).sum(), [*conv.parameters()]) for z in (y, conv(x)))
    assert all(maxdiff(a, b) < 1e-4 for a, b in zip(ours, theirs))


def test_words_that_are_nearly_one_are_moved_apart():
    text_encoder, tokenizer = unet.make_text_encoder(), train.make_tokenizer()
    left, right = (tokenizer.get_vocab()[word] for word in ("left", "right"))
    words = text_encoder.get_input_embeddings().weight
    words.data[left] = words.data[right] + 1e-4 * randn(64)
    optimizer, alike = torch.optim.Adam(text_encoder.parameters(), 1e-2), []
    ids = unet.token_ids(tokenizer, unet.same_story(torch.tensor([0, 0, 0, 0])))
    for _ in range(100):
        alike.append(unet.words_alike(text_encoder, ids))
        alike[-1].backward()
        optimizer.step(), optimizer.zero_grad()
    assert alike[0] > 0.1 and alike[-1] == 0  # one pair of ten is one


def test_muon_is_torchs_within_the_rounding_of_bfloat16():
    """Two matrices of one shape, a tall one, and a kernel, which torch's takes as a matrix."""
    start = [randn(*shape, seed=seed) for seed, shape in enumerate([(6, 8), (6, 8), (9, 5), (4, 3, 3, 1)])]
    ours, theirs = ([x.clone() for x in start], [x.flatten(1).clone() for x in start])
    torchs = torch.optim.Muon(theirs, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for params, optimizer in ((ours, Muon(ours, 0.1)), (theirs, torchs)):
        for step in range(3):
            for seed, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * step + seed)
            optimizer.step()
    for x, p, q in zip(start, ours, theirs):
        assert (p.flatten(1) - q).norm() < 0.05 * (q - x.flatten(1)).norm()


def own_clips(n: int) -> tuple[torch.Tensor, ...]:
    """What `train.own_clips` returns, filled with noise."""
    stories = W.sample_stories(n, rng())
    return *randn(2, n, 13, 8, 8, 8), stories, W.sample_motion(stories, rng()), torch.ones(n, 13, 1, 8, 8)


def test_training_aims_at_the_schedulers_v():
    """And at the v that leads to the target, where the input shows another clip."""
    scheduler, t = train.make_scheduler(), torch.tensor([3, 400, 998])
    models = None, None, train.make_tokenizer(), scheduler
    x, other, stories, _, _ = own_clips(3)
    noised, v, sigma, *_ = train.noised(models, x, x, stories, t, rng())
    alpha = scheduler.alphas_cumprod[t].float().sqrt().view(sigma.shape)
    noise = (noised - alpha * x) / sigma
    torch.testing.assert_close(v, scheduler.get_velocity(x, noise, t), atol=1e-4, rtol=1e-4)
    noised, v, sigma, *_ = train.noised(models, x, other, stories, t, rng())
    torch.testing.assert_close(alpha * noised - sigma * v, other, atol=1e-5, rtol=1e-5)


def test_the_transformer_learns_to_mend_its_own_clips(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x, _, stories, motions, masks = own_clips(1)
    own = torch.ones_like(x), torch.zeros_like(x), stories, motions, masks
    config = dict(train.make_transformer().config, num_layers=1, num_attention_heads=2)
    transformer = type(train.make_transformer()).from_config(config)
    models = transformer, train.make_text_encoder().eval(), train.make_tokenizer(), train.make_scheduler()

    @torch.no_grad()
    def error():
        x, v, sigma, ids, t = train.noised(models, *own[:3], torch.tensor([300]), rng())
        return (sigma * (train.predicted_v(models, x, ids, t) - v)).square().mean().item()

    before = error()
    monkeypatch.setattr(train, "BATCH", 4)
    train.tune_transformer(models, (-own[0], stories, masks), own, 150, tmp_path)
    assert error() < 0.5 * before
    assert torch.load(tmp_path / "mending.pt", weights_only=True)["step"] == 150
