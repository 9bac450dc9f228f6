"""The command line, as a user meets it, on random weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

import demo
import prompts
import syncos
import videos
from backbones import RECIPES

ROOT = Path(__file__).parent.parent


def call(*words) -> None:
    demo.main([str(w) for w in words])


def frames_of(path):
    return np.stack([frame for frame in imageio.get_reader(path)])  # list() would ask for an endless length


def test_help_names_everything_and_imports_no_torch():
    done = subprocess.run([sys.executable, ROOT / "demo.py", "--help"], capture_output=True, text=True, check=True)
    text = re.sub(r"\s", "", done.stdout)  # argparse breaks lines at hyphens
    assert all(name in text for name in [*RECIPES, *syncos.METHODS, *syncos.ABLATIONS, "structured-prompt"])
    code = "import sys, demo\ntry: demo.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_list_scenarios(capsys):
    call("--list_scenarios")
    out = capsys.readouterr().out
    assert all(f"{name}\n" in out for name in prompts.SCENARIOS)


def test_a_run_writes_video_and_sheet(base, tmp_path, capsys):
    call(*base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["video.mp4", "video.png"]
    assert frames_of(tmp_path / "video.mp4").shape == (33, 256, 512, 3)  # 16x32, enlarged
    assert imageio.imread(tmp_path / "video.png").std() > 0
    captured = capsys.readouterr()
    assert "syncos: 24 model evaluations" in captured.out  # 4 steps x 3 windows + 2 refined steps x 2 x 3
    assert "24/24" in captured.err  # and that is what was used
    assert "event 2, windows 2 to 3: it jumps" in captured.out


def test_same_seed_same_latents_whatever_the_window_batch(base, tmp_path):
    results = []
    for extra in ([], ["--window_batch", 2], ["--seed", 1]):
        call(*base, "--save_latents", *extra)
        results.append(videos.read_tensors(tmp_path / "video.safetensors", "latents")[0]["syncos"])
    assert (results[0] - results[1]).abs().max() < 1e-4
    assert (results[0] - results[2]).abs().max() > 1e-2


def test_saved_latents_decode_to_the_same_video(base, tmp_path):
    call(*base, "--save_latents", "--compare")
    latents, about = videos.read_tensors(tmp_path / "video.safetensors", "latents")
    assert list(latents) == ["gen-l-video", "syncos"] and latents["syncos"].shape == (9, 4, 2, 4)
    assert about["global"] == "a red fox ." and about["local"] == ["it runs", "it jumps"]
    model = base[base.index("--model") + 1]
    call("--decode", tmp_path / "video.safetensors", "--device", "cpu", "--output_path", tmp_path / "again.mp4")
    assert np.array_equal(frames_of(tmp_path / "video.mp4"), frames_of(tmp_path / "again.mp4"))
    assert (tmp_path / "video.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    call("--decode", tmp_path / "video.safetensors", "--device", "cpu", "--model", model, "--vae_tiling",
         "--output_path", tmp_path / "tiled.gif")  # fmt: skip
    assert len(frames_of(tmp_path / "tiled.gif")) == 33
    assert frames_of(tmp_path / "video.mp4").shape[2] == 1024  # side by side


@pytest.mark.parametrize(
    "words, count", [([], 590), (["--preset", "fast"], 386), (["--preset", "paper", "--csd_iters", "5"], 680)]
)
def test_presets_change_the_settings_and_options_change_presets(words, count, capsys):
    call(*words, "--plan")
    assert f"syncos: {count} model evaluations" in capsys.readouterr().out


def test_a_trace_holds_every_step_of_every_method(base, tmp_path):
    call(
        *base, "--compare", "gen-l-video", "csd", "syncos", "--save_latents", "--trace", tmp_path / "trace.safetensors"
    )
    traces, about = videos.read_tensors(tmp_path / "trace.safetensors", "trace")
    assert list(traces) == ["gen-l-video", "csd", "syncos"] and about["num_frames"] == 33
    assert all(trace.shape == (4, 9, 4 * 16) for trace in traces.values())  # steps, latent frames, 4 channels of 4 x 4
    latents, _ = videos.read_tensors(tmp_path / "video.safetensors", "latents")
    for name, trace in traces.items():  # the last step ends clean: its estimate is the result
        small = torch.nn.functional.adaptive_avg_pool2d(latents[name], 4).flatten(1)
        assert torch.allclose(trace[-1], small, atol=1e-6)


@pytest.mark.parametrize(
    "extra", [["--method", "csd"], ["--ablate", "stage-1", "fixed-noise"], ["--ablate", "structured-prompt"]]
)
def test_methods_and_ablations_run(base, tmp_path, capsys, extra):
    call(*base, *extra)
    assert (tmp_path / "video.mp4").exists()
    assert ("syncos w/o" in capsys.readouterr().out) == (extra[0] == "--ablate")


def test_the_embedded_model_is_the_default(tmp_path, capsys):
    call(
        "--num_frames",
        57,
        "--num_inference_steps",
        3,
        "--prompt",
        "A ball. It jumps.",
        "--output_path",
        tmp_path / "a.gif",
    )
    assert len(frames_of(tmp_path / "a.gif")) == 57
    assert "57 frames at 16 fps = 15 latent frames: 2 windows of 13, stride 4" in capsys.readouterr().out


def test_plan_stops_before_loading(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    call(*base, "--plan")
    assert "model evaluations" in capsys.readouterr().out and not list(tmp_path.iterdir())
    call("--backbone", "cogvideox", "--plan")  # needs neither hub nor GPU
    out = capsys.readouterr().out
    assert ("no cuda here" in out) != torch.cuda.is_available()
    assert "193 frames at 8 fps = 49 latent frames: 10 windows of 13, stride 4" in out
    assert "syncos: 1220 model evaluations" in out and "zai-org/CogVideoX-2b" in out


def bad_inputs(tmp_path):
    (tmp_path / "bad.json").write_text('{"prompts": []}')
    (tmp_path / "noise.safetensors").write_bytes(b"nonsense")
    state, other = str(tmp_path / "a.safetensors"), str(tmp_path / "sub" / ".." / "b.safetensors")
    (tmp_path / "sub").mkdir(exist_ok=True)
    return {
        "no scenario nowhere": ["--scenario", "nowhere"],
        "Event 2 of 3 is empty": ["--prompt", "a || b"],
        "4 events do not fit into 3 windows": ["--prompt", "a|b|c|d"],
        "fits no window plan.*nearest is 33": ["--num_frames", "30"],
        "at least 17; the nearest is 17": ["--num_frames", "9"],
        "stride must be between 1 and": ["--stride", "6"],
        "object with the keys": ["--story", str(tmp_path / "bad.json")],
        "Cannot read the story": ["--story", str(tmp_path / "none.json")],
        "not both": ["--prompt", "a", "--scenario", "corgi"],
        "--global_prompt goes with": ["--global_prompt", "a", "--scenario", "corgi"],
        "name of .* must end in .mp4 or .gif or .webp": ["--output_path", str(tmp_path / "video.avi")],
        "does not exist; make it": ["--output_path", str(tmp_path / "no" / "video.mp4")],
        "is no CogVideoX pipeline": ["--model", str(tmp_path / "none")],
        "no backbone sora": ["--backbone", "sora"],
        "no device gpu": ["--device", "gpu"],
        "no cuda here": ["--device", "cuda"],
        "--offload moves": ["--offload", "model"],
        "stage-9 is not known": ["--ablate", "stage-9"],
        "goes with neither": ["--ablate", "stage-1", "--method", "csd"],
        "csd_batch must be at least 1": ["--csd_batch", "0"],
        "--num_inference_steps must be": ["--num_inference_steps", "0"],
        "--guidance_scale must be": ["--guidance_scale", "nan"],
        "--seed must be a number from 0 to 18446744073709551615": ["--seed", str(2**64)],
        "--t_min must be a number from -1 to 1000, got nan": ["--t_min", "nan"],
        "--t_min must be a number from -1 to 1000, got 5000": ["--t_min", "5000"],
        "--csd_lr must be a number from 0 to 100, got inf": ["--csd_lr", "inf"],
        "--guidance_scale must be a number from 0 to 100, got inf": ["--guidance_scale", "inf"],
        "--num_inference_steps must be a number from 1 to 1000, got 2000": ["--num_inference_steps", "2000"],
        "--height must be a number from 1 to": ["--backbone", "opensora-plan", "--height", "0"],
        "--width must be a number from 1 to": ["--backbone", "opensora-plan", "--width", "-32"],
        "would be both the state and the trace": ["--state", state, "--trace", state],
        "would be both the latents and the state": ["--state", str(tmp_path / "video.undecoded.safetensors")],
        "would be both the latents and the trace": ["--save_latents", "--trace", str(tmp_path / "video.safetensors")],
        "would be both the trace and what is resumed": ["--state", state, "--resume", other, "--trace", other],
        "would be both the state and the trace.* name": ["--trace", str(tmp_path / "video.state.safetensors")],
        "holds no latents": ["--decode", str(tmp_path / "noise.safetensors")],
        "holds no latents.*FileNotFound": ["--decode", str(tmp_path / "none.safetensors")],
    }


@pytest.mark.parametrize("number", range(37))
def test_bad_input_is_one_sentence_and_exit_2(base, tmp_path, capsys, monkeypatch, number):
    if torch.cuda.is_available() and "cuda" in list(bad_inputs(tmp_path))[number]:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(demo, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    reason, words = list(bad_inputs(tmp_path).items())[number]
    drop = {"--scenario", "--story", "--global_prompt", "--prompt"} & set(words)
    kept = [
        w
        for pair in zip(base[::2], base[1::2])
        if not (drop and pair[0] in ("--prompt", "--global_prompt"))
        for w in pair
    ]
    (tmp_path / "video.mp4").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        call(*kept, *words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and len(error) < 400
    assert re.search(reason, error), error
    assert (tmp_path / "video.mp4").read_text() == "precious"


def test_no_gpu_for_a_big_backbone(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        call("--backbone", "cogvideox")
    captured = capsys.readouterr()
    assert exit.value.code == 2 and "There is no cuda here; --device cpu" in captured.err and not captured.out


def test_a_decoder_that_fails_leaves_the_old_video_and_the_latents(base, tmp_path, monkeypatch):
    (tmp_path / "video.mp4").write_text("precious")

    def broken(self, latents):
        yield np.zeros((16, 32, 3), np.uint8)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(RECIPES["cogvideox"].backbone, "decode", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        call(*base)
    assert (tmp_path / "video.mp4").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["video.mp4", "video.undecoded.safetensors"]
    monkeypatch.undo()
    call(
        "--decode", tmp_path / "video.undecoded.safetensors", "--device", "cpu", "--output_path", tmp_path / "video.mp4"
    )
    assert len(frames_of(tmp_path / "video.mp4")) == 33


def test_a_story_file_is_the_same_as_its_words(base, tmp_path, capsys):
    call(*base, "--plan")
    words = capsys.readouterr().out
    (tmp_path / "story.json").write_text(json.dumps({"global": "a red fox .", "local": ["it runs", "it jumps"]}))
    call(*base[: base.index("--prompt")], "--story", tmp_path / "story.json", "--plan")
    assert capsys.readouterr().out == words


def test_a_video_says_how_it_was_made(base, tmp_path):
    """In its metadata, which any player shows; and a suffix may be in capitals."""
    call(*base, "--output_path", tmp_path / "video.MP4")
    ffmpeg = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-loglevel",
        "quiet",
        "-i",
        tmp_path / "video.MP4",
        "-f",
        "ffmetadata",
        "-",
    ]
    text = subprocess.run(ffmpeg, capture_output=True, text=True, check=True).stdout.replace("\\", "")
    run = json.loads(re.search(r"comment=(.*)", text)[1])
    assert run["seed"] == 0 and run["prompts"][0] == "a red fox . it runs" and "syncos" in run["methods"]
    data = (tmp_path / "video.MP4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


def test_captions_stand_under_the_picture_and_change_with_the_event(base, tmp_path):
    call(*base, "--compare", "--save_latents")
    plain = frames_of(tmp_path / "video.mp4")
    call(
        "--decode", tmp_path / "video.safetensors", "--device", "cpu", "--captions", "--output_path", tmp_path / "c.mp4"
    )
    frames = frames_of(tmp_path / "c.mp4").astype(int)
    assert frames.shape[1] > 256 and frames.shape[2] == plain.shape[2]
    assert np.abs(frames[:, :256] - plain).mean() < 3
    strips = frames[:, 256 + 6 :]
    cut = round(33 * prompts.event_spans([slice(0, 5), slice(2, 7), slice(4, 9)], [0, 1, 1])[0][1])
    change = np.abs(strips[1:] - strips[:-1]).mean((1, 2, 3))
    assert change.argmax() + 1 in (cut - 1, cut, cut + 1) and np.median(change) < change.max() / 3
    assert strips.min() < 100 and strips.max() > 240  # black on white


def test_a_stage_2_that_never_runs_is_said(base, capsys):
    call(*base, "--t_min", 1000, "--plan")
    assert "stage 2 never runs, for no t of the walk is above t_min = 1000" in capsys.readouterr().out
    call(*base, "--plan")
    assert "stage 2 above t = 300, in 2 of them, down to alpha/sigma = " in capsys.readouterr().out


def test_the_papers_preset_keeps_a_models_noise_level(capsys):
    for backbone, t_min in {"cogvideox": 800, "opensora-plan": 800, "tiny": 800, "wan": 930}.items():
        call("--backbone", backbone, "--preset", "paper", "--plan")
        assert f"stage 2 above t = {t_min}, " in capsys.readouterr().out
