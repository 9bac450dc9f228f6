"""From options to a plan: everything that can be known, and refused, before a model is loaded. All
of this raises ValueError, one sentence that says what is wrong and what to do."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones import Recipe
from extras import runs
from extras import videos as V
from extras.baselines import Method, Plan
from extras.methods import METHODS, SynCoS
from extras.models import get_recipe
from extras.processes import several_processes
from prompts import SCENARIOS, Story, load_story, parse_events
from syncos import ABLATIONS, Settings

LIMITS = {  # of numbers, both ends included; syncos.Settings checks the others
    "seed": (0, 2**64 - 1), "num_inference_steps": (1, 1000), "t_min": (-1, 1000), "num_frames": (1, 10**6),
    "guidance_scale": (0, 100), "csd_lr": (0, 100), "fps": (0.01, 1000), "window_batch": (1, 10**6),
    "height": (1, 10**4), "width": (1, 10**4), "window_frames": (1, 10**4), "preview": (1, 10**6),
}  # fmt: skip


def plan_run(args: argparse.Namespace) -> runs.Run:
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} must be a number from {low} to {high}, got {value}.")
    recipe = choose_recipe(args)
    V.check_rate(args.output_path, recipe.fps)
    device, dtype = choose_device(args, recipe)
    methods = choose_methods(args, recipe.settings)
    story = choose_story(args, recipe.scenario)
    plan = Plan(recipe, tuple(story.event_prompts(structured="structured-prompt" not in args.ablate)))
    for method in methods.values():
        method.check(plan)
    return runs.Run(plan, story, methods, device, dtype, args.seed)


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """The backbone's recipe with the user's choices."""
    recipe = get_recipe(args.backbone, args.model)
    pick = lambda *names: {k: v for k in names if (v := getattr(args, k)) is not None}  # noqa: E731
    if size := pick("height", "width", "window_frames"):
        c, (_, h, w) = recipe.frames_per_latent, recipe.latent
        own = dict(height=8 * h, width=8 * w, window_frames=c * (recipe.window - 1) + 1)
        recipe = replace(recipe.backbone.resize(recipe, *(own | size).values()), seconds={})
    settings = replace(recipe.settings, **pick("csd_iters", "csd_lr", "csd_batch", "t_min"))
    chosen = pick("stride", "num_frames", "num_inference_steps", "guidance_scale", "fps", "window_batch", "captions")
    recipe = replace(recipe, settings=settings, **chosen)

    c, step = recipe.frames_per_latent, recipe.frames_step
    least = -(-(recipe.window - 1) * c // step) * step + 1
    if (recipe.num_frames - 1) % step or recipe.num_frames < least:
        nearest = max(step * round((recipe.num_frames - 1) / step) + 1, least)
        raise ValueError(
            f"--num_frames {recipe.num_frames} does not fit: it must be {f'{step} n + 1 and ' * (step > 1)}at least "
            f"{least}; the nearest is {nearest}."
        )
    return recipe


def choose_device(args: argparse.Namespace, recipe: Recipe) -> tuple[str, torch.dtype]:
    """The device, whether or not this machine has it, and the dtype."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = args.device or ("cuda" if best == "cpu" and recipe.needs_gpu else best)
    kind = V.device_kind(device)
    if args.compile and args.offload == "sequential":
        raise ValueError("--compile recompiles every layer with --offload sequential; use --offload model or none.")
    if kind == "cpu" and args.offload != "none":
        raise ValueError("--offload moves parts of the model between GPU and CPU; leave it out on the CPU.")
    return device, getattr(torch, args.dtype or ("float32" if kind == "cpu" else recipe.dtype))


def choose_methods(args: argparse.Namespace, settings: Settings) -> dict[str, Method]:
    known = [*ABLATIONS, "structured-prompt"]
    if unknown := [part for part in args.ablate if part not in known]:
        raise ValueError(f"--ablate {unknown[0]} is unknown; choose from {', '.join(known)}.")
    if args.ablate and (args.method != "syncos" or args.compare is not None):
        raise ValueError("--ablate removes parts of SynCoS; it goes with neither another --method nor --compare.")
    names = [args.method] if args.compare is None else args.compare or ["gen-l-video", "syncos"]
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"The method {unknown[0]} is unknown; choose from {', '.join(METHODS)}.")
    if args.ablate:
        for part in args.ablate:
            settings = replace(settings, **ABLATIONS.get(part, {}))
        return {f"syncos w/o {' and '.join(args.ablate)}": SynCoS(settings)}
    return {name: METHODS[name](settings) for name in names}


def choose_story(args: argparse.Namespace, default: str) -> Story:
    given = [name for name in ("prompt", "story", "scenario") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"Give one story: --{given[0]} or --{given[1]}, not both.")
    if args.global_prompt and given != ["prompt"]:
        raise ValueError("--global_prompt goes with --prompt; a story file or scenario has its own.")
    if args.prompt is not None:
        return parse_events(args.prompt, args.global_prompt)
    if args.story is not None:
        return load_story(args.story)
    name = args.scenario or default
    if name not in SCENARIOS:
        raise ValueError(f"The scenario {name} does not exist; --list_scenarios shows them all.")
    return SCENARIOS[name]


def check_files(args: argparse.Namespace) -> None:
    """Refuse a file that cannot be written, or that is another of the run's files."""
    out, safe = args.output_path, (".safetensors",)
    if not out.name:
        raise ValueError("--output_path must name a file, .mp4, .gif or .webp.")
    written = {"the video": (out, (".mp4", ".gif", ".webp")), "its contact sheet": (out.with_suffix(".png"), (".png",))}
    if not args.decode:
        written["the latents"] = latents_file(args), safe
        written["the state"] = state_file(args), safe
    if args.trace:
        written["the trace"] = args.trace, safe
    for path, suffixes in written.values():
        V.check_output(path, suffixes)
    files = {what: path for what, (path, _) in written.items()} | {"what is decoded": args.decode}
    if args.resume and args.state and args.resume.resolve() != args.state.resolve():
        files["what is resumed"] = args.resume
    V.check_distinct({what: path for what, path in files.items() if path})


def latents_file(args: argparse.Namespace) -> Path:
    """Where the latents wait for decoding, or stay."""
    return args.output_path.with_suffix(".safetensors" if args.save_latents else ".undecoded.safetensors")


def keeps_state(args: argparse.Namespace) -> bool:
    """Save after every step? Several processes always do: if one dies, the others cannot."""
    return bool(args.state or args.resume or several_processes())


def state_file(args: argparse.Namespace) -> Path:
    return args.state or args.resume or args.output_path.with_suffix(".state.safetensors")


def read_latents(args: argparse.Namespace) -> tuple[Recipe, dict[str, Tensor], dict[str, Any]]:
    """What --decode names: its backbone's recipe, latents and the rest of `describe_video`."""
    latents, about = V.read_tensors(args.decode, "latents")
    V.check_rate(args.output_path, args.fps or about["fps"])
    return get_recipe(about["backbone"], args.model or about["model"]), latents, about


def describe_video(args: argparse.Namespace, run: runs.Run) -> dict[str, Any]:
    """What must be known to decode saved latents, and what the video's file should say."""
    recipe, story = run.plan.recipe, run.story
    about = dict(backbone=args.backbone, model=args.model, num_frames=recipe.num_frames, fps=recipe.fps)
    about |= dict(captions=recipe.captions, run=run.about(), spans=run.plan.spans)
    return about | {"global": story.global_prompt, "local": story.local_prompts}
