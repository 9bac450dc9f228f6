"""The check of a model on somebody's machine, on random weights."""

import json
from dataclasses import replace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from extras.measure import check as C
from extras.models import RECIPES
from extras.models.wan import Wan


def run(folder, backbone, capsys, *words):
    """Exit status, text and JSON of a check."""
    path = folder / "check.png"
    options = ["--backbone", backbone, "--device", "cpu", "--steps", 4, "--prompt", "it runs", "--output_path", path]
    with pytest.raises(SystemExit) as stop:
        C.main([str(word) for word in [*options, *words]])
    out = capsys.readouterr()
    report = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").exists() else None
    return stop.value.code, out.out + out.err, report


@pytest.fixture
def small(monkeypatch):
    """Short videos, and Wan's window as small as its random model."""
    get_recipe = C.get_recipe

    def smaller(*args):
        recipe = get_recipe(*args)
        if recipe.backbone is Wan:
            recipe = replace(recipe, window=3, latent=(4, 4, 6))
        return replace(recipe, num_frames=recipe.frames_per_latent * (recipe.window - 1) + 1)

    monkeypatch.setattr(C, "get_recipe", smaller)


@pytest.mark.parametrize("kind, dtype, offload", [
    ("sincos", "float32", "none"), ("rotary", "bfloat16", "none"), ("sincos", "float32", "model"),
    ("wan", "float32", "none"), ("wan", "bfloat16", "none"),
])  # fmt: skip
def test_the_adapter_passes_against_the_pipeline(kind, dtype, offload, request, tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(C.options, "choose_device", lambda *_: ("cpu", getattr(torch, dtype)))  # offload on the CPU
    backbone = "wan" if kind == "wan" else "cogvideox"
    model = request.getfixturevalue(f"{kind}_folder")
    code, text, report = run(tmp_path, backbone, capsys, "--model", model, "--offload", offload)
    assert code == 0, text
    assert "PASS" in report["verdict"] and report["verdict"] in text
    assert report["latents, relative difference"] > 0 and "NaN" not in json.dumps(report)
    assert {"evaluation, adapter", "evaluation, pipeline"} < set(report["seconds"])
    predicted = [row.get("predicted") for row in report["memory"].values()]
    assert len(predicted) == 3 and all((x is None) == (offload != "none") for x in predicted)
    assert (tmp_path / "check.txt").read_text().strip() in text
    picture = imageio.imread(tmp_path / "check.png")
    left, right = np.split(picture.astype(int), 2, axis=1)
    assert np.abs(left - right).mean() < 2 < picture.std()


@pytest.mark.parametrize("fault", ["guidance", "schedule", "prompt", "decoder"])
def test_a_wrong_adapter_fails(fault, sincos_folder, tmp_path, capsys, small, monkeypatch):
    kind = RECIPES["cogvideox"].backbone
    decode, levels, texts = kind.decode, kind.levels, kind.encode_text
    wrong = dict(
        guidance=("denoise", lambda self, *args, own=kind.denoise: own(self, *args).flip(0)),
        schedule=("levels", lambda self, steps: [x._replace(alpha=x.alpha**1.2) for x in levels(self, steps)]),
        prompt=("encode_text", lambda self, pipe, text: texts(self, pipe, "a fox" if text else "")),
        decoder=("decode", lambda self, z: decode(self, z * 1.1)),
    )[fault]
    monkeypatch.setattr(kind, *wrong)
    code, text, report = run(tmp_path, "cogvideox", capsys, "--model", sincos_folder)
    assert code == 1 and "FAIL" in report["verdict"], text


def test_a_model_without_a_pipeline_is_measured(opensora_release, tmp_path, capsys, small):
    code, text, report = run(tmp_path, "opensora-plan", capsys, "--model", opensora_release)
    assert code == 0, text
    assert "diffusers has no pipeline" in text and report["seconds"]["evaluation, adapter"] > 0
    assert (tmp_path / "check.png").exists()


def test_bad_input_is_a_sentence_and_trouble_leaves_a_report(sincos_folder, tmp_path, capsys, small, monkeypatch):
    for words, hint in (
        (("--steps", 0), "--steps"),
        (("--model", tmp_path), "CogVideoX"),
        (("--device", "tpu"), "tpu"),
    ):
        code, text, report = run(tmp_path, "cogvideox", capsys, *words)
        assert code == 2 and hint in text and "Traceback" not in text and report is None

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RECIPES["cogvideox"].backbone, "decode", fail)
    code, text, report = run(tmp_path, "cogvideox", capsys, "--model", sincos_folder)
    assert code == 1 and "memory is not enough" in report["verdict"] and report["seconds"]["evaluation, pipeline"]
