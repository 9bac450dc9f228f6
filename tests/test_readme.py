"""The README's own code and figures."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import demo
import fifo
from backbones import RECIPES, get_recipe, in_batches
from syncos import METHODS, Settings, count_evaluations, make_windows, syncos

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_is_read_in_three_minutes():
    assert len(README.splitlines()) <= 150


def test_every_link_leads_somewhere():
    for folder in (".", "tiny", "measure"):
        for link in re.findall(r"\]\((?!http)([^)#]*)", (ROOT / folder / "README.md").read_text()):
            assert (ROOT / folder / link).exists(), (folder, link)


def test_the_snippet_runs_and_is_the_backbone(tmp_path, monkeypatch):
    """Copied from the README, with the tiny model's name, sizes and settings: bit for bit what the adapter gives."""
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for theirs, ours in {
        '"zai-org/CogVideoX-2b", dtype=torch.float16).to("cuda")': f'"{RECIPES["tiny"].model}")',
        "frames, window, steps, guidance = 49, 13, 50, 6.0": "frames, window, steps, guidance = 17, 13, 4, 6.0",
        "Settings()": "Settings(t_min=500, csd_iters=2)",
        "A red fox in deep snow.": "A star.",
        "It runs.": "It grows.",
    }.items():
        assert theirs in code, theirs
        code = code.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert len(list(demo.V.read_frames(tmp_path / "fox.mp4")[0])) == 65

    backbone = get_recipe("tiny").backbone(RECIPES["tiny"].model)
    prompts = ["A star. It grows.", "A star. It jumps."]
    backbone.encode(prompts)
    backbone.load()
    generator = torch.Generator().manual_seed(0)
    noise, windows, settings = torch.randn(17, 8, 8, 8, generator=generator), make_windows(17, 13, 4), names["Settings"]
    levels = backbone.levels(4)
    predict_x0 = in_batches(backbone.predict_x0, 1)
    x = syncos(predict_x0, noise, levels, windows, prompts, settings(t_min=500, csd_iters=2), generator)
    assert (x - names["latents"]).abs().max() < 1e-4


@pytest.mark.parametrize("column, name", enumerate(["cogvideox", "opensora-plan", "wan", "videocrafter2", "tiny"], 1))
def test_the_settings_table_is_the_recipes(column, name):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:2] == "| "]
    cells = {re.sub(r"\[|\]\(.*\)|`|--", "", row[0]): row[column] for row in rows if len(row) == 7}
    r = RECIPES[name]
    s: Settings = r.settings
    levels = r.backbone.make_levels(r.scheduler, r.num_inference_steps)
    assert cells["windows, latent frames"].split()[0] == str(r.window)
    assert cells["stride"] == str(s.stride) and cells["t_min"] == f"{s.t_min:g}"
    assert cells["steps, eta"] == f"{r.num_inference_steps}, 0" and cells["guidance"] == f"{r.guidance_scale:g}"
    assert cells["csd_iters, csd_lr"] == f"{s.csd_iters}, {s.csd_lr:g}" and cells["csd_batch"] == str(s.csd_batch)
    assert cells["num_frames"] == str(r.num_frames)
    steps, windows = r.num_inference_steps, r.windows()
    queued = fifo.count_turns(steps, r.window, windows[-1].stop)
    queued = fifo.count_evaluations(steps, r.window, queued, fifo.FifoSettings())
    assert cells["model evaluations"] == str(count_evaluations(levels, windows, s))
    assert cells["of Gen-L-Video"] == str(count_evaluations(levels, windows, replace(s, **METHODS["gen-l-video"])))
    assert cells["of FIFO-Diffusion"] == (str(queued) if r.backbone.frame_timesteps else "-")
