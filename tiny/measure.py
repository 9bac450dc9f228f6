"""Measure the tiny model with the world's own renderer: what do its clips show?

    python tiny/measure.py quality      single clips of full captions: the share that is right in shape, colour, place
                                        and action
    python tiny/measure.py coherence    four-event videos of open captions, Gen-L-Video against SynCoS: how many
                                        identities (colour and place) the windows show, how many follow their prompt

Each result is kept in tiny/work/ as it comes; the same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import world as W  # noqa: E402
from backbones import get_recipe  # noqa: E402
from prompts import Story, assign_events  # noqa: E402
from syncos import METHODS, implied_noise, make_windows, revert, syncos  # noqa: E402

NAMES = ["shape", "colour", "place", "action"]


def interval(values: list[float], draws: int = 10000) -> str:
    """Mean and its 95 % bootstrap interval."""
    x = torch.tensor(values, dtype=torch.float64)
    means = x[torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{x.mean():.2f} [{low:.2f}, {high:.2f}]"


def video_of(backbone, latents: torch.Tensor) -> torch.Tensor:
    """Latents F C H W -> video T 3 H W in [0, 1]."""
    return torch.stack([torch.from_numpy(f) for f in backbone.decode(latents)]).permute(0, 3, 1, 2) / 255


def quality(recipe, backbone, fitter, n: int, done: dict, keep) -> None:
    """n clips of random stories, ten at a time, by plain DDIM."""
    levels = backbone.levels(recipe.num_inference_steps)
    for batch in tqdm(range(0, n, 10), desc="clips / 10"):
        key = f"quality {recipe.model} {batch}"
        if key in done:
            continue
        generator = torch.Generator().manual_seed(batch)
        stories = W.sample_stories(10, generator)
        captions = [W.caption(s) for s in stories]
        backbone.encode(captions)
        x = torch.randn(10, recipe.window, *recipe.latent, generator=generator)
        for level, prev in zip(levels, levels[1:]):
            x0 = backbone.predict_x0(x, level.t, captions)
            x = revert(x0, implied_noise(x, x0, level), prev)
        keep(key, [[fitter(video_of(backbone, z)[::4])[0], s] for z, s in zip(x, stories.tolist())])
    pairs = [pair for batch in range(0, n, 10) for pair in done[f"quality {recipe.model} {batch}"]]
    print(f"{len(pairs)} clips of full captions, share that is right (95 % bootstrap interval):")
    for i, name in enumerate(NAMES):
        print(f"  {name:8} {interval([float(got[i] == asked[i]) for got, asked in pairs])}")
    for i, phrase in enumerate(W.ACTIONS.values()):
        right = [[float(g == a) for g, a in zip(got, asked)] for got, asked in pairs if asked[3] == i]
        shares = ", ".join(f"{name} {sum(column) / len(right):.2f}" for name, column in zip(NAMES, zip(*right)))
        print(f"  {len(right)} clips of {phrase!r}: {shares}")


def scenario(seed: int) -> tuple[Story, list[int], int]:
    """A four-event story of one shape whose colour and place are open; its actions, and the shape."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    shape = int(torch.randint(len(W.SHAPES), (), generator=generator))
    actions = torch.randperm(len(W.ACTIONS), generator=generator)[:4].tolist()
    return Story(f"A {W.SHAPES[shape]}.", tuple(list(W.ACTIONS.values())[a] for a in actions)), actions, shape


def coherence(recipe, backbone, fitter, seeds: range, methods: list[str], done: dict, keep) -> None:
    """Each scenario with each method from the same noise; every window of the decoded video is fitted."""
    levels, rows = backbone.levels(recipe.num_inference_steps), {m: [] for m in methods}
    windows = make_windows((recipe.num_frames - 1) // 4 + 1, recipe.window, recipe.settings.stride)
    for seed in tqdm(seeds, desc="scenarios"):
        story, actions, shape = scenario(seed)
        events = assign_events(windows, 4)
        prompts = [story.event_prompts()[e] for e in events]
        for method in methods:
            settings = replace(
                recipe.settings, **METHODS.get(method) or json.loads(method if method[0] == "{" else "{}")
            )
            key = f"coherence {recipe.model} {settings} {seed}"
            if key not in done:
                backbone.encode(prompts)
                generator = torch.Generator().manual_seed(seed)
                noise = torch.randn(windows[-1].stop, *recipe.latent, generator=generator)
                x = syncos(backbone.predict_x0, noise, levels, windows, prompts, settings, generator)
                video = video_of(backbone, x)
                change = (video[1:] - video[:-1]).abs().mean().item()
                keep(key, [[fitter(video[4 * w.start : 4 * w.start + W.FRAMES : 4])[0] for w in windows], change])
            fits, change = done[key]
            identities = [(color, place) for _, color, place, _ in fits]
            rows[method].append(
                (
                    len(set(identities)),
                    len({color for color, _ in identities}),
                    len({place for _, place in identities}),
                    sum(f[3] == actions[e] for f, e in zip(fits, events)) / len(fits),
                    sum(f[0] == shape for f in fits) / len(fits),
                    1000 * change,
                )
            )
    print(f"{len(seeds)} scenarios of four events, {len(windows)} windows each; mean [95 % bootstrap interval]:")
    names = ["identities", "colours", "places", "windows that follow their prompt", "right shape", "motion x 1000"]
    for method, values in rows.items():
        print(method)
        for name, column in zip(names, zip(*values)):
            print(f"  {name:34}{interval(column)}")
    if len(methods) > 1:
        print(f"{methods[-1]} minus {methods[0]}, scenario by scenario")
        for name, a, b in zip(names, zip(*rows[methods[0]]), zip(*rows[methods[-1]])):
            print(f"  {name:34}{interval([q - p for p, q in zip(a, b)])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "coherence"])
    parser.add_argument("--model", default=str(HERE / "checkpoint"))
    parser.add_argument("--clips", type=int, default=200, help="for quality (default: 200)")
    parser.add_argument("--scenarios", type=int, nargs=2, default=[0, 20], help="first and last + 1 (default: 0 20)")
    parser.add_argument("--methods", nargs="+", default=["gen-l-video", "syncos"],
                        help='names, or changes to the settings as JSON, e.g. \'{"t_min": 600}\'')  # fmt: skip
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    recipe = get_recipe("tiny", args.model)
    backbone = recipe.backbone(args.model, "cpu", getattr(torch, args.dtype), recipe.guidance_scale)
    weights = b"".join(path.read_bytes() for path in sorted(Path(args.model).rglob("*.safetensors")))
    recipe = replace(recipe, model=f"{hashlib.sha256(weights).hexdigest()[:12]} {args.dtype}")  # what results belong to
    results = HERE / "work" / "measured.jsonl"
    results.parent.mkdir(exist_ok=True)
    done = dict(map(json.loads, results.read_text().splitlines())) if results.exists() else {}

    def keep(key, value):
        done[key] = json.loads(json.dumps(value))
        with results.open("a") as file:
            file.write(json.dumps([key, value]) + "\n")

    if args.what == "quality":
        quality(recipe, backbone, W.Fitter(), args.clips, done, keep)
    else:
        coherence(recipe, backbone, W.Fitter(), range(*args.scenarios), args.methods, done, keep)


if __name__ == "__main__":
    main()
