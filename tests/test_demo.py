"""The command line as a user meets it, on random weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import call, frames_of, refusal
from PIL import Image

import demo
from backbones import CogVideoX
from extras import videos as V
from extras.methods import METHODS
from extras.models import RECIPES
from extras.models.checked import CheckedCogVideoX
from prompts import SCENARIOS
from syncos import ABLATIONS

ROOT = Path(__file__).parents[1]


# --------------------------------------------------------------------------------------------------
# Before a model is loaded: help, plans, refusals

HELP = """
import runpy, sys
for sys.argv[1:], status in ((["--help"], 0), (["--no_such_option"], 2)):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert end.code == status
assert "torch" not in sys.modules
"""


def test_help_names_everything_and_imports_no_torch(tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.argv = [{str(ROOT / 'demo.py')!r}]\n{HELP}"]
    wide = os.environ | {"COLUMNS": "1000"}  # no line breaks inside names
    done = subprocess.run(command, cwd=tmp_path, env=wide, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert {*RECIPES, *METHODS, *ABLATIONS, "structured-prompt"} <= set(re.findall(r"[\w-]+(?:\.\d)?", done.stdout))
    assert "no_such_option" in done.stderr and "Traceback" not in done.stderr


def test_an_old_python_is_one_sentence():
    code = "import runpy, sys; sys.version_info = (3, 10, 13); runpy.run_path('demo.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r".*3\.11.*\n", done.stderr)


def test_list_scenarios(capsys):
    call("--list_scenarios")
    assert set(SCENARIOS) <= set(capsys.readouterr().out.splitlines())


def test_plan_stops_before_loading(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("a model was loaded"))
    call(*base, "--plan")
    assert "model evaluations" in capsys.readouterr().out and not list(tmp_path.iterdir())
    call("--backbone", "cogvideox", "--plan")  # needs neither hub nor GPU
    out = capsys.readouterr().out
    assert ("not available" in out) != torch.cuda.is_available()
    assert "193 frames at 8 fps = 49 latent frames: 10 windows of 13, stride 4" in out
    assert "syncos: 1220 model evaluations" in out and "zai-org/CogVideoX-2b" in out


def test_the_plan_follows_the_options(base, capsys):
    for words, count in {"": 590, "--csd_iters 2": 386, "--t_min 800 --num_inference_steps 50": 680}.items():
        call(*words.split(), "--plan")
        assert f"syncos: {count} model evaluations" in capsys.readouterr().out
    for t_min, said in {300: "stage 2 above t = 300, in 2 steps, down to alpha", 1000: "stage 2 never runs"}.items():
        call(*base, "--t_min", t_min, "--plan")
        assert said in capsys.readouterr().out


def test_events_last_as_long_as_they_should(base, tmp_path, capsys):
    """On tiny: 12.1 s and ten windows, whose centres are 0.98 s apart."""
    spans = lambda: re.findall(r"event \d, (\S+) to (\S+) s", capsys.readouterr().out)  # noqa: E731
    call("--plan")
    assert spans() == [("0.0", "3.1"), ("3.1", "6.0"), ("6.0", "9.0"), ("9.0", "12.1")]
    call("--plan", "--durations", 3, 2, 2, 5)
    assert spans() == [("0.0", "3.1"), ("3.1", "5.0"), ("5.0", "7.0"), ("7.0", "12.1")]
    story = {"global": "A star.", "local": ["It jumps.", "It grows."], "durations": [1, 3]}
    (tmp_path / "story.json").write_text(json.dumps(story))
    call("--plan", "--story", tmp_path / "story.json")
    assert spans() == [("0.0", "3.1"), ("3.1", "12.1")]
    call("--plan", "--backbone", "tiny-unet", "--method", "video-infinity")  # four clips of its own
    assert spans() == [("0.0", "2.0"), ("2.0", "4.0"), ("4.0", "6.0"), ("6.0", "8.0")]


def test_a_story_file_is_the_same_as_its_words(base, tmp_path, capsys):
    call(*base, "--plan")
    words = capsys.readouterr().out
    (tmp_path / "story.json").write_text(json.dumps({"global": "a red fox .", "local": ["it runs", "it jumps"]}))
    call(*base[: base.index("--prompt")], "--story", tmp_path / "story.json", "--plan")
    assert capsys.readouterr().out == words


REFUSALS = {  # words after those of `base` without its story; {} is a folder -> a keyword of the refusal
    "--scenario nowhere": "nowhere",
    "--prompt a|b|c|d": "events",
    "--story {}/bad.json": "keys",
    "--prompt a --scenario corgi": "--scenario",
    "--global_prompt a --scenario corgi": "--global_prompt",
    "--num_frames 30": "33",
    "--stride 6": "stride",
    "--csd_batch 0": "csd_batch",
    "--durations 1 2": "Each of 4 events needs a duration",
    "--durations 1 1 1 99": "Event 1 of 4 would get none",
    "--t_min nan": "--t_min",
    "--t_min -1": "--t_min",
    "--prompt a --method csd --csd_lr 1": "--csd_lr has no effect on csd",
    "--prompt a --method gen-l-video": "--t_min has no effect on gen-l-video",
    "--prompt a --compare csd gen-l-video --csd_lr 1": "--csd_lr has no effect on csd and gen-l-video",
    "--prompt a --ablate t-min --t_min 500": "--t_min has no effect",
    "--prompt a --method stage-2-alone --t_min 500": "--t_min has no effect",
    "--prompt a --preview 5": "has 4 steps",
    "--list_scenarios --seed 3": "--list_scenarios does not go with --",
    "--compare --method syncos": "--compare does not go with --method",
    "--compare syncos syncos": "twice",
    "--ablate stage-1 stage-2": "never asked",
    "--prompt a --ablate stage-1 --t_min 1000": "never asked",
    "--ablate stage-2 fixed-noise": "contradict",
    "--prompt a --ablate structured-prompt": "global prompt",
    "--height 64": "--height",
    "--backbone sora": "sora",
    "--model {}/none": "CogVideoX",
    "--device gpu": "gpu",
    "--offload model": "--offload",
    "--method sora --prompt a": "sora",
    "--prompt a --compare fifo syncos": "at least 5",  # steps
    "--ablate stage-9": "stage-9",
    "--ablate stage-1 --method fifo": "--ablate",
    "--output_path {}/video.avi": ".mp4",
    "--output_path {}/no/video.mp4": "folder",
    "--state {0}/a.safetensors --trace {0}/a.safetensors": "trace",
    "--state {}/video.undecoded.safetensors": "latents",
    "--state {0}/a.safetensors --resume {0}/b.safetensors --trace {0}/../{1}/b.safetensors": "resumed",
    "--decode {}/bad.json": "--decode does not go with --",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(base, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "bad.json").write_text('{"prompts": []}')
    (tmp_path / "video.mp4").write_text("precious")
    error = refusal(capsys, *base[: base.index("--prompt")], *words.format(tmp_path, tmp_path.name).split())
    assert REFUSALS[words] in error
    assert (tmp_path / "video.mp4").read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_what_is_decoded_must_be_latents(tmp_path, capsys):
    (tmp_path / "story.json").write_text("{}")
    assert "no latents" in refusal(capsys, "--decode", tmp_path / "story.json", "--output_path", tmp_path / "v.mp4")


def test_a_machine_without_a_gpu(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for words in (["--backbone", "cogvideox"], [*base, "--device", "cuda:0"]):
        assert "--device cpu" in refusal(capsys, *words)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# What a run writes


def test_a_run_writes_video_and_sheet(base, tmp_path, capsys):
    call(*base, "--output_path", tmp_path / "video.MP4")
    path = tmp_path / "video.MP4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["video.MP4", "video.png"]
    assert frames_of(path).shape == (33, 256, 512, 3)  # 16x32, enlarged
    assert imageio.imread(tmp_path / "video.png").std() > 0
    captured = capsys.readouterr()
    assert "syncos: 24 model evaluations" in captured.out  # 4 steps x 3 windows + 2 refined steps x 2 x 3
    assert "24/24" in captured.err  # and that is what was used
    assert "event 2, 1.6 to 4.1 s: it jumps" in captured.out

    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "quiet", "-i", path, "-f", "ffmetadata", "-"]
    metadata = subprocess.run(ffmpeg, capture_output=True, text=True, check=True).stdout.replace("\\", "")
    made = json.loads(re.search(r"comment=(.*)", metadata)[1])  # how the video was made
    assert made["seed"] == 0 and made["texts"][0] == "a red fox . it runs" and "syncos" in made["methods"]
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")  # plays while it loads


def test_same_seed_same_latents_whatever_the_window_batch(base, tmp_path):
    results = []
    for extra in ([], ["--window_batch", 2], ["--seed", 1]):
        call(*base, "--save_latents", *extra)
        results.append(V.read_tensors(tmp_path / "video.safetensors", "latents")[0]["syncos"])
        (tmp_path / "video.safetensors").unlink()
    assert (results[0] - results[1]).abs().max() < 1e-4
    assert (results[0] - results[2]).abs().max() > 1e-2


def test_saved_latents_decode_to_the_same_video(base, tmp_path):
    """Also with captions, in tiles, and at another frame rate."""
    call(*base, "--save_latents", "--compare")
    latents, about = V.read_tensors(tmp_path / "video.safetensors", "latents")
    assert list(latents) == ["gen-l-video", "syncos"] and latents["syncos"].shape == (9, 4, 2, 4)
    assert about["global"] == "a red fox ." and about["local"] == ["it runs", "it jumps"]
    decode = ["--decode", tmp_path / "video.safetensors", "--device", "cpu", "--output_path"]
    call(*decode, tmp_path / "again.mp4")
    plain = frames_of(tmp_path / "video.mp4")
    assert plain.shape == (33, 256, 1024, 3)  # side by side
    assert np.array_equal(plain, frames_of(tmp_path / "again.mp4"))
    assert (tmp_path / "video.png").read_bytes() == (tmp_path / "again.png").read_bytes()

    call(*decode, tmp_path / "tiled.gif", "--vae_tiling", "--fps", 12.5, "--model", base[base.index("--model") + 1])
    frames, fps = V.read_frames(tmp_path / "tiled.gif")
    assert len(list(frames)) == 33 and fps == pytest.approx(12.5)

    call(*decode, tmp_path / "captions.mp4", "--captions")
    frames = frames_of(tmp_path / "captions.mp4").astype(int)
    assert frames.shape[1] > 256 and np.abs(frames[:, :256] - plain).mean() < 3
    strips = frames[:, 256 + 6 :]
    assert strips.min() < 100 and strips.max() > 240  # black on white
    change = np.abs(strips[1:] - strips[:-1]).mean((1, 2, 3))
    cut = round(33 * 3.5 / 9)  # half-way between the centres of the first two windows
    assert abs(change.argmax() + 1 - cut) <= 1 and np.median(change) < change.max() / 3


def test_a_trace_holds_every_step_of_every_method(base, tmp_path):
    names = ["gen-l-video", "stage-2-alone", "syncos"]
    call(*base, "--compare", *names, "--save_latents", "--trace", tmp_path / "trace.safetensors")
    traces, about = V.read_tensors(tmp_path / "trace.safetensors", "trace")
    assert list(traces) == names and about["num_frames"] == 33
    assert all(trace.shape == (4, 9, 4 * 16) for trace in traces.values())  # steps, latent frames, 4 channels of 4 x 4
    latents, _ = V.read_tensors(tmp_path / "video.safetensors", "latents")
    for name, trace in traces.items():  # the last step ends clean: its estimate is the result
        small = torch.nn.functional.adaptive_avg_pool2d(latents[name], 4).flatten(1)
        assert torch.allclose(trace[-1], small, atol=1e-6)


def test_ablations_run(base, tmp_path, capsys):
    call(*base, "--save_latents", "--ablate", "stage-1", "structured-prompt")
    name = "syncos w/o stage-1 and structured-prompt"
    assert list(V.read_tensors(tmp_path / "video.safetensors", "latents")[0]) == [name]
    assert f"{name}: 12 model evaluations" in capsys.readouterr().out and (tmp_path / "video.mp4").exists()


def test_any_folder_a_read_only_checkout_and_a_reader_who_leaves(tmp_path):
    """The defaults, shortened, in a new process with a copy of the program: `python
    /elsewhere/demo.py | head -1`."""
    copy, here = tmp_path / "checkout", tmp_path / "here"
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "measure", "*.ipynb")
    shutil.copytree(ROOT, copy, ignore=leave_out)
    here.mkdir()
    for path in (*copy.rglob("*"), copy):
        path.chmod(path.stat().st_mode & ~0o222)  # means nothing to root, so look for new files as well
    files = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    words = [copy / "demo.py", "--num_frames", "57", "--num_inference_steps", "3", "--prompt", "A ball. It jumps."]
    quiet = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = subprocess.Popen([sys.executable, *words], cwd=here, env=quiet, text=True, **pipes)
    assert "tiny" in run.stdout.readline()
    run.stdout.close()
    error = run.stderr.read()
    assert run.wait(60) == 0 and "Error" not in error, error
    assert sorted(p.name for p in here.iterdir()) == ["output.mp4", "output.png"]
    assert len(frames_of(here / "output.mp4")) == 57
    assert files == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}


# --------------------------------------------------------------------------------------------------
# What can go wrong while it writes


def test_no_memory_names_what_helps_and_loses_nothing(base, tmp_path, monkeypatch):
    (tmp_path / "video.mp4").write_text("precious")
    latents = tmp_path / "video.undecoded.safetensors"

    def full(*_):
        yield np.zeros((16, 32, 3), np.uint8)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(CheckedCogVideoX, "decode", full)
    with pytest.raises(SystemExit, match=f"--decode {latents} --vae_tiling"):
        call(*base)
    assert (tmp_path / "video.mp4").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["video.mp4", latents.name]
    monkeypatch.undo()
    call("--decode", latents, "--device", "cpu", "--output_path", tmp_path / "video.mp4")
    assert len(frames_of(tmp_path / "video.mp4")) == 33

    monkeypatch.setattr(CogVideoX, "predict_x0", lambda *_: list(full()))
    with pytest.raises(SystemExit, match="--window_batch 1.*--vae_tiling.*--offload model.*--offload sequential"):
        call(*base)


def test_a_full_disk_is_one_sentence(base, tmp_path):
    """A limit on the size of files, which looks to a program like a full disk."""
    resource = pytest.importorskip("resource", reason="this system has no limits for a file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state, latents = tmp_path / "s.safetensors", tmp_path / "video.undecoded.safetensors"
    for limit, what, safe in ((3000, state, ""), (60_000, tmp_path / "video.mp4", f"--decode {latents}")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(SystemExit) as end:
                call(*base, "--state", state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert end.value.code.startswith(f"Cannot write {what}: ") and safe in end.value.code
        assert ("--decode" in end.value.code) == bool(safe) and "\n" not in end.value.code
    assert [p.name for p in tmp_path.iterdir()] == [latents.name]


def test_webp_is_whole_even_if_nothing_moves(tmp_path):
    """WebP merges equal frames."""
    for name, shades in dict(still=[7] * 20, moving=range(0, 200, 10)).items():
        path = tmp_path / f"{name}.webp"
        V.write_video(path, (np.full((32, 48, 3), shade, np.uint8) for shade in shades), 10)
        picture = Image.open(path)
        assert picture.size == (48, 32) and picture.n_frames == len(set(shades))
        picture.seek(picture.n_frames - 1)
        assert abs(np.asarray(picture.convert("RGB")).mean() - shades[-1]) < 3
    assert picture.info["loop"] == 0  # for ever
    path.write_bytes(path.read_bytes()[:-1])
    assert not V.is_whole(path, 20)


def test_the_sheet_gives_an_event_the_times_of_the_plan(monkeypatch, tmp_path):
    """0.743 of 193 frames is 143.4 frames, 8.96 s: not the 8.94 s of whole frames."""
    sheets, frames = [], iter([np.zeros((16, 16, 3), np.uint8)] * 193)
    monkeypatch.setattr(V, "contact_sheet", lambda *args: sheets.append(args))
    V.write_story(tmp_path / "a.mp4", {"": frames}, 193, 16, [((0, 0.743), "a"), ((0.743, 1), "b")], "title")
    assert [text for _, text in sheets[0][2]] == ["1 \u00b7 0.0 to 9.0 s \u00b7 a", "2 \u00b7 9.0 to 12.1 s \u00b7 b"]
