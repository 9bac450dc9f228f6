"""What a first run with real weights may meet: damaged files, long names, NaN, ..."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import call, make_tokenizer, randn, refusal
from PIL import ImageFont
from safetensors.torch import load_file, save_file

from backbones import CogVideoX, check_finite
from extras import meeting, runs
from extras import videos as V
from extras.loading import load_network
from extras.models import get_recipe
from extras.models.checked import Checked, CheckedCogVideoX
from extras.models.wan import Wan

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def model(sincos_folder, tmp_path):
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(sincos_folder, tmp_path / "model"))


@pytest.fixture
def words(base, model, tmp_path):
    """`base`, with the copy; its outputs alone in a folder."""
    (tmp_path / "out").mkdir()
    return [*base, "--model", str(model), "--output_path", str(tmp_path / "out" / "video.mp4")]


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path, change):
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def filled(state, key, value):
    state[key].fill_(value)
    return state


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name, fits", [("狐" * 75, True), ("狐" * 84, False), ("a" * 240, False), ("a" * 300, False)])
def test_every_name_that_a_run_may_write_fits_or_is_refused(words, tmp_path, capsys, name, fits):
    """Names are counted in bytes; the longest ends in .undecoded.safetensors."""
    words = [*words, "--output_path", str(tmp_path / "out" / f"{name}.mp4")]
    if fits:
        call(*words, "--state", tmp_path / "out" / f"{'b' * 240}.safetensors")
        assert len(list((tmp_path / "out").iterdir())) == 2
    else:
        assert "too long" in refusal(capsys, *words)
        assert not list((tmp_path / "out").iterdir())


def test_places_where_nothing_can_be_written(words, tmp_path, capsys):
    try:
        (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    except OSError:
        pytest.skip("this system lets no user make links")
    for path in (tmp_path / "loop.mp4", *(["/proc/video.mp4"] if Path("/proc").is_dir() else [])):
        assert "written" in refusal(capsys, *words, "--output_path", path)
    assert not list((tmp_path / "out").iterdir())


# --------------------------------------------------------------------------------------------------
# Values that are not finite


def test_a_network_that_is_not_finite_stops_the_run_at_its_first_estimate(words, model, tmp_path):
    change_weights(model / "transformer" / WEIGHTS, lambda s: filled(s, "proj_out.weight", torch.inf))
    with pytest.raises(SystemExit, match="after step 1, .*bfloat16") as end:
        call(*words)
    assert "\n" not in end.value.code and not list((tmp_path / "out").iterdir())


def test_the_state_stays_the_last_good_one(words, tmp_path, monkeypatch):
    predict, calls = CogVideoX.predict_x0, []

    def broken(self, latents, t, prompts):
        calls.append(t)
        return predict(self, latents, t, prompts) / (t > 500)

    monkeypatch.setattr(CogVideoX, "predict_x0", broken)
    with pytest.raises(SystemExit, match="after step 3, .*--resume"):
        call(*words)
    state = tmp_path / "out" / "video.state.safetensors"
    tensors, about = V.read_tensors(state, "state")
    assert about["step"] == 2 and all(x.isfinite().all() for x in tensors.values())
    monkeypatch.undo()
    call(*words, "--resume", state)
    assert (tmp_path / "out" / "video.mp4").exists()


def test_an_embedding_that_is_not_finite_stops_the_run(words, model, tmp_path):
    change_weights(model / "text_encoder" / "model.safetensors", lambda s: filled(s, sorted(s)[0], torch.nan))
    with pytest.raises(SystemExit, match="embedding.*bfloat16"):
        call(*words)
    assert not list((tmp_path / "out").iterdir())


def test_a_decoder_that_is_not_finite_keeps_the_latents(words, model, tmp_path):
    """And previews are skipped with one line."""
    change_weights(model / "vae" / WEIGHTS, lambda s: filled(s, "decoder.conv_out.conv.bias", torch.nan))
    with pytest.raises(SystemExit, match="frame.*float32.*--decode"):
        call(*words, "--preview", 4)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["video.undecoded.safetensors"]


def test_the_check_costs_one_synchronisation_per_step(monkeypatch, words):
    seen = []
    monkeypatch.setattr(runs, "check_finite", lambda what, *tensors: seen.append(what) or check_finite(what, *tensors))
    call(*words)
    assert len(seen) == 4


# --------------------------------------------------------------------------------------------------
# Prompts


class Words(Checked):
    """Four words and an end mark."""

    text_length = 5

    def load_pipe(self, *parts):
        pipe = torch.nn.Module()
        pipe.tokenizer = make_tokenizer()
        return pipe

    def encode_text(self, pipe, text):
        return (torch.zeros(1),)


def test_a_prompt_that_is_cut_is_told_and_two_that_become_one_are_refused(recwarn):
    backbone = Words("")
    backbone.encode(["a red fox runs", "a fox"])
    assert not recwarn
    backbone.encode(["a red fox runs and jumps"])
    assert 'does not see "and jumps"' in str(recwarn.pop(UserWarning).message)
    with pytest.raises(ValueError, match="two events become the same"):
        backbone.encode(["a red fox runs and jumps", "a red fox runs and sleeps"])
    backbone.encode(["a red fox runs and looks"] * 2)  # the same on purpose


@pytest.mark.parametrize("name", ["cogvideox", "opensora-plan", "wan", "videocrafter2"])
def test_every_backbone_does_so(name, wan_folder, sincos_folder, tmp_path, request):
    folders = {"cogvideox": sincos_folder, "wan": wan_folder}
    releases = {"opensora-plan": "opensora_release", "videocrafter2": "videocrafter2_release"}
    folder = folders.get(name) or request.getfixturevalue(releases[name])
    backbone = get_recipe(name, str(folder)).backbone(str(folder))
    text = "a " * backbone.text_length
    with pytest.raises(ValueError, match="two events"), pytest.warns(UserWarning, match="does not see"):
        backbone.encode([text + "runs", text + "jumps"])


# --------------------------------------------------------------------------------------------------
# Damaged and foreign models

T5, T5_KEY = "text_encoder/model.safetensors", "encoder.final_layer_norm.weight"
TRANSFORMER, KEY = f"transformer/{WEIGHTS}", "proj_out.weight"
VAE, VAE_KEY = f"vae/{WEIGHTS}", "decoder.conv_out.conv.bias"
DAMAGES = {
    "prefixed keys": (T5, lambda s: {f"model.{k}": v for k, v in s.items()}, "12 missing keys"),
    "a missing key": (TRANSFORMER, lambda s: {k: v for k, v in s.items() if k != KEY}, KEY),
    "a missing text key": (T5, lambda s: {k: v for k, v in s.items() if k != T5_KEY}, T5_KEY),
    "a missing key of the VAE": (VAE, lambda s: {k: v for k, v in s.items() if k != VAE_KEY}, VAE_KEY),
    "a wrong shape": (TRANSFORMER, lambda s: s | {KEY: torch.zeros(3, 3)}, "(3, 3)"),
    "a wrong text shape": (T5, lambda s: s | {T5_KEY: torch.zeros(3)}, "(3,)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_part_loads_completely_or_is_refused(words, model, tmp_path, capfd, damage):
    file, change, keyword = DAMAGES[damage]
    change_weights(model / file, change)
    with pytest.raises(SystemExit) as end:
        call(*words)
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("demo.py: ")]
    assert end.value.code == 2 and len(error) == 1 and keyword in error[0] and str(model) in error[0]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("file", [T5, TRANSFORMER, VAE, "tokenizer/tokenizer.json"])
def test_a_git_lfs_pointer_is_named(words, model, capsys, file):
    (model / file).write_text(LFS)
    with pytest.raises(SystemExit):
        call(*words)
    error = capsys.readouterr().err
    assert f"{model / file} is a Git-LFS pointer" in error and "Traceback" not in error


@pytest.mark.parametrize("file", [T5, TRANSFORMER, VAE, "transformer/config.json", "tokenizer"])
def test_what_is_missing_or_cut_short_is_named(words, model, capsys, file):
    for damage in ("cut", "missing"):
        if (path := model / file).is_file() and damage == "cut":
            path.write_bytes(path.read_bytes()[:100])
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        with pytest.raises(SystemExit) as end:
            call(*words)
        error = capsys.readouterr().err
        assert end.value.code == 2 and str(model) in error and "sentencepiece" not in error


def test_a_folder_of_one_variant_loads(model):
    path = model / "transformer" / WEIGHTS
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    from diffusers import CogVideoXTransformer3DModel

    assert load_network(CogVideoXTransformer3DModel, str(model), "transformer", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("changes, keyword", [
    (dict(prediction_type="epsilon"), "prediction_type"), (dict(beta_schedule="sigmoid"), "scheduler"),
    (dict(num_train_timesteps=2), "scheduler"),
])  # fmt: skip
def test_a_scheduler_that_cannot_be_used_is_refused_before_the_plan(words, model, capsys, changes, keyword):
    change_json(model / SCHEDULER, **changes)
    assert keyword in refusal(capsys, *words, "--plan")


@pytest.mark.parametrize("text", ["[1]", "null", "{}"])
def test_a_damaged_configuration_is_one_sentence(words, model, capsys, text):
    (model / "transformer" / "config.json").write_text(text)
    assert str(model) in refusal(capsys, *words, "--plan")


def test_an_image_to_video_model_is_refused_by_its_channels(words, model, wan_folder, tmp_path, capsys):
    change_json(model / "model_index.json", _class_name="SomebodysPipeline")
    call(*words, "--plan")  # an odd name with the right network
    capsys.readouterr()
    change_json(model / "transformer" / "config.json", in_channels=8)
    assert "image-to-video" in refusal(capsys, *words, "--plan")
    wan = shutil.copytree(wan_folder, tmp_path / "wan")
    change_json(wan / "transformer" / "config.json", in_channels=36)
    with pytest.raises(ValueError, match="image-to-video"):
        Wan(str(wan))


# --------------------------------------------------------------------------------------------------
# The GPU path, as far as it shows without one


def test_more_processes_than_gpus(monkeypatch, words, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", LOCAL_RANK="0", RANK="0", MASTER_ADDR="a", MASTER_PORT="1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "open_store", lambda *_: pytest.fail("met"))
    assert "--nproc_per_node 2" in refusal(capsys, *words, "--device", "cuda")
    assert "one GPU" in refusal(capsys, *words, "--device", "cuda:0")


def test_compile_and_sequential_offload_do_not_go_together(capsys):
    assert "--offload" in refusal(capsys, "--backbone", "cogvideox", "--compile", "--offload", "sequential", "--plan")


def test_previews_are_tiled(sincos_folder):
    backbone, seen = CheckedCogVideoX(sincos_folder), []
    backbone.load(decoder_only=True)
    tiled = backbone.pipe.vae.tiled_decode
    backbone.pipe.vae.tiled_decode = lambda *args, **options: seen.append(1) or tiled(*args, **options)
    assert len(list(backbone.preview(randn(3, 4, 8, 8)))) == 9 and seen
    assert not backbone.pipe.vae.use_tiling


def test_loading_starts_no_conversion(opensora_release):
    get_recipe("opensora-plan", str(opensora_release)).backbone(str(opensora_release)).load_pipe("tokenizer")
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"


def test_wan_at_720p_has_its_own_shift(capsys):
    for size, shift in (((480, 832), 3.0), ((720, 1280), 5.0)):
        assert Wan.resize(get_recipe("wan"), *size, 81).scheduler["flow_shift"] == shift
    call("--backbone", "wan", "--height", 720, "--width", 1280, "--plan")
    assert "stage 2 above t = 930, in 13 steps" in capsys.readouterr().out


def test_the_plan_predicts_the_time_where_figures_exist(capsys):
    for words, said in {
        "--backbone cogvideox": "37 min on one A100 or 18 min on one H100",
        "--backbone cogvideox-5b": "73 min on one A100",
        "--backbone wan": "102 min on one RTX 4090",
        "--backbone opensora-plan": "not known",
        "--backbone wan --height 720 --width 1280": "not known",
    }.items():
        call(*words.split(), "--plan")
        assert said in capsys.readouterr().out
    call("--plan")
    assert "predicted" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Videos and letters


def test_a_variable_frame_rate_gives_no_repeats(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3)).astype(np.uint8)
    V.write_video(tmp_path / "even.mp4", iter(frames), 8)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", tmp_path / "even.mp4", "-fps_mode", "vfr"]
    subprocess.run([*ffmpeg, "-vf", "select='not(mod(n,3))+lt(n,8)'", tmp_path / "uneven.mp4"], check=True)
    for name, count in (("even", 20), ("uneven", 12)):
        seen = list(V.read_frames(tmp_path / f"{name}.mp4")[0])
        assert len(seen) == count and all((a != b).any() for a, b in zip(seen, seen[1:]))
    with pytest.raises(ValueError, match="mp4"):
        V.read_frames(tmp_path / "video.webp")


def test_letters_that_the_font_lacks_are_found_or_told(monkeypatch, recwarn):
    V.find_font.cache_clear()
    assert V.find_font("A fox.") == (None, "") and not recwarn
    assert V.lacks(ImageFont.load_default(12), "a狐") == "狐"
    monkeypatch.setattr(V, "FONTS", ())
    for _ in range(2):
        V.get_font(12, "狐")
    assert len(recwarn) == 1 and "狐" in str(recwarn.pop(UserWarning).message)
    V.find_font.cache_clear()
