"""The README's own code, links and figures."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from helpers import frames_of, make_pipeline, randomize, rng

from extras.baselines import Plan
from extras.methods import METHODS
from extras.models import RECIPES, get_recipe
from syncos import Settings, syncos

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("extras/**/README.md")):
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), (page, path)
            assert not anchor or anchor in anchors(target), (page, path, anchor)


def test_code_on_the_page_is_that_of_the_files():
    shown = [line.strip() for line in "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)).splitlines()]
    files = (ROOT / "syncos.py").read_text() + (ROOT / "extras" / "minimal.py").read_text()
    assert shown and set(shown) <= {line.strip() for line in files.splitlines()}


def test_the_minimal_program_gives_what_the_backbone_gives(tmp_path, monkeypatch):
    """As it stands, but a small random model answers to the released one's name."""
    pipe = make_pipeline(rotary=False)
    small = dict(
        pipe.transformer.config, sample_frames=49, max_text_seq_length=226, num_attention_heads=1, num_layers=1
    )
    pipe.register_modules(transformer=randomize(CogVideoXTransformer3DModel.from_config(small)))
    pipe.save_pretrained(tmp_path)
    recipe = get_recipe("cogvideox", str(tmp_path))
    backbone = recipe.make()
    plan = Plan(recipe, ("A red fox in deep snow. It runs.", "A red fox in deep snow. It jumps."))
    backbone.encode(plan.texts)
    backbone.load()
    levels, generator, prompts = backbone.levels(50), rng(), [plan.texts[event] for event in plan.events]
    noise = torch.randn(49, *recipe.latent, generator=generator)
    expected = syncos(backbone.predict_x0, noise, levels, plan.windows, prompts, Settings(), generator)

    def from_pretrained(name, dtype, **left_out):
        assert name == RECIPES["cogvideox"].model and dtype == torch.float16 and not any(left_out.values())
        part = CogVideoXPipeline(**pipe.components | left_out)
        part.to = lambda device: part if device == "cuda" else pytest.fail(device)
        return part

    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "extras" / "minimal.py").read_text()
    with torch.enable_grad():  # the program turns gradients off: only until here
        exec(code, names := {})
    assert not any(x.requires_grad for x in names["texts"].values())  # T5's graph would hold 7 GiB
    assert (names["latents"] - expected).abs().mean() < 1e-4  # AdamW amplifies the rounding of single values
    assert frames_of(tmp_path / "fox.mp4").shape == (193, 16, 32, 3)


def test_the_table_is_the_recipes():
    measured = {"tiny": "17 s", "tiny-unet": "20 s"}
    for name, r in RECIPES.items():
        plan = Plan(r, ("one event",))
        counts = [
            m.evaluations(plan, m.steps(plan)) for m in (METHODS[k](r.settings) for k in ("syncos", "gen-l-video"))
        ]
        times = ", ".join(f"{counts[0] * each / 60:.0f} min ({gpu})" for gpu, each in r.seconds.items())
        [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {counts[0]} ({counts[1]}) | {times or measured.get(name, 'not known')}" in row
