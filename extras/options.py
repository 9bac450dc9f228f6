"""Turn options into a plan, and validate all of them before a model is loaded. Errors are
ValueErrors of one sentence, which the user reads."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones import Recipe
from extras import devices, runs
from extras import videos as V
from extras.baselines import METHOD_OPTIONS, Method, Plan
from extras.meeting import several_processes
from extras.methods import METHODS, SynCoS
from extras.models import get_recipe
from extras.states import unfinished
from prompts import SCENARIOS, Story, load_story, parse_events
from syncos import ABLATIONS, Settings, ablate

DEFAULTS = dict(backbone="tiny", offload="none", global_prompt="", method="syncos", ablate=(), seed=0,
                output_path=Path("output.mp4"))  # fmt: skip
DEFAULTS |= dict.fromkeys(("vae_tiling", "list_scenarios", "save_latents", "plan", "compile"), False)
MODES = {  # options that do something else than sample, and what goes with them
    "list_scenarios": (),
    "decode": ("model", "device", "dtype", "offload", "vae_tiling", "output_path", "captions", "fps"),
}
LIMITS = {  # of numbers, both ends included; syncos.Settings checks the others
    "seed": (0, 2**64 - 1), "num_inference_steps": (1, 1000), "t_min": (0, 1000), "num_frames": (1, 10**6),
    "guidance_scale": (0, 100), "csd_lr": (0, 100), "fps": (0.01, 1000), "window_batch": (1, 10**6),
    "height": (1, 10**4), "width": (1, 10**4), "window_frames": (1, 10**4), "preview": (1, 10**6),
}  # fmt: skip


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """The options with their defaults. Refuses those that exclude each other."""
    given = [name for name, value in vars(args).items() if value is not None]
    for mode in MODES.keys() & set(given):
        if ignored := [name for name in given if name not in (mode, *MODES[mode])]:
            raise ValueError(f"--{mode} does not go with --{ignored[0]}; leave out one of them.")
    for name, other in (("compare", "method"), ("compare", "ablate")):
        if name in given and other in given:
            raise ValueError(f"--{name} does not go with --{other}; leave out one of them.")
    return argparse.Namespace(**vars(args) | {k: v for k, v in DEFAULTS.items() if k not in given})


def plan_run(args: argparse.Namespace) -> runs.Run:
    """The run that settled options describe."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} must be a number from {low} to {high}, got {value}.")
    device, dtype = choose_device(args, get_recipe(args.backbone))  # before anything of another model is downloaded
    recipe = choose_recipe(args)
    V.check_rate(args.output_path, recipe.fps)
    methods = choose_methods(args, recipe.settings)
    story = choose_story(args, recipe.scenario)
    if args.durations:
        story = replace(story, durations=tuple(args.durations))
    if "structured-prompt" in args.ablate and not story.global_prompt:
        raise ValueError("--ablate structured-prompt leaves out the global prompt, but this story has none.")
    texts = story.event_prompts(structured="structured-prompt" not in args.ablate)
    plan = Plan(recipe, tuple(texts), story.durations)
    for method in methods.values():
        method.check(plan)
    steps = max(method.steps(plan) for method in methods.values())
    if args.preview and args.preview > steps:
        raise ValueError(f"--preview {args.preview} would never be reached; the run has {steps} steps.")
    return runs.Run(plan, story, methods, device, dtype, args.seed)


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """The backbone's recipe with the user's choices."""
    recipe = get_recipe(args.backbone, args.model)
    pick = lambda *names: {k: v for k in names if (v := getattr(args, k)) is not None}  # noqa: E731
    if size := pick("height", "width", "window_frames"):
        c, (_, h, w) = recipe.frames_per_latent, recipe.latent
        own = dict(height=8 * h, width=8 * w, window_frames=c * (recipe.window - 1) + 1)
        recipe = replace(recipe.backbone.resize(recipe, *(own | size).values()), seconds={})
    settings = replace(recipe.settings, **pick("csd_iters", "csd_lr", "csd_batch", "t_min", "shared_noise"))
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
    """The device and the dtype. A plan may be for a device that this machine lacks."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = args.device or ("cuda" if best == "cpu" and recipe.needs_gpu else best)
    kind = devices.device_kind(device)
    if args.compile and args.offload == "sequential":
        raise ValueError("--compile recompiles every layer with --offload sequential; use --offload model or none.")
    if kind == "cpu" and args.offload != "none":
        raise ValueError("--offload moves parts of the model between GPU and CPU; leave it out on the CPU.")
    dtype = getattr(torch, args.dtype or ("float32" if kind == "cpu" else recipe.dtype))
    if not args.plan:
        devices.check_device(device, dtype)
    return device, dtype


def choose_methods(args: argparse.Namespace, settings: Settings) -> dict[str, Method]:
    """The methods by name. Refuses options that act on none of them."""
    names = [args.method] if args.compare is None else args.compare or ["gen-l-video", "syncos"]
    known = dict.fromkeys(args.ablate, [*ABLATIONS, "structured-prompt"]) | dict.fromkeys(names, METHODS)
    for name, choices in known.items():
        if name not in choices:
            raise ValueError(f"{name} is unknown; choose from {', '.join(choices)}.")
        if (*args.ablate, *names).count(name) > 1:
            raise ValueError(f"{name} is named twice; once is enough.")
    methods = {name: METHODS[name](settings) for name in names}
    if args.ablate:
        if args.method != "syncos":
            raise ValueError(f"--ablate removes parts of SynCoS and does not go with --method {args.method}.")
        parts = [part for part in args.ablate if part in ABLATIONS]
        methods = {f"syncos w/o {' and '.join(args.ablate)}": SynCoS(ablate(settings, parts))}
    for name in METHOD_OPTIONS:
        if getattr(args, name) is not None and not any(name in method.options for method in methods.values()):
            raise ValueError(f"--{name} has no effect on {' and '.join(methods)}; leave it out.")
    return methods


def list_scenarios() -> str:
    """The ready-made stories, as text."""
    lines = ((name, s.global_prompt, *(f"- {text}" for text in s.local_prompts)) for name, s in SCENARIOS.items())
    return "\n".join("\n    ".join(part) for part in lines)


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
    """Refuse a file that cannot be written, or that is another of the run's files; and words that
    no model, file or console could take, because they are not in the system's encoding."""
    for name, value in vars(args).items():
        try:
            json.dumps(value, default=str, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"--{name} is not valid UTF-8; is it in the encoding of another system?") from None
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
    V.check_ffmpeg()
    files = {what: path for what, (path, _) in written.items()} | {"what is decoded": args.decode}
    if args.resume and args.state and args.resume.resolve() != args.state.resolve():
        files["what is resumed"] = args.resume
    V.check_distinct({what: path for what, path in files.items() if path})
    if not args.plan and not args.decode:
        check_unfinished(args)


def check_unfinished(args: argparse.Namespace) -> None:
    """Refuse to overwrite the state, latents or trace of an earlier run."""
    latents, state = latents_file(args), state_file(args)
    if latents.exists():
        raise ValueError(
            f"{latents} holds the latents of an earlier run: --decode {latents} writes its video; for this run choose "
            "another --output_path."
        )
    if state.exists() and not (args.resume and state.resolve() == args.resume.resolve()):
        raise ValueError(unfinished(state))
    if args.trace and args.trace.exists():
        raise ValueError(f"{args.trace} holds the trace of an earlier run; choose another name for this one's.")


def latents_file(args: argparse.Namespace) -> Path:
    """The file that keeps the latents until they are decoded, or for good (--save_latents)."""
    return args.output_path.with_suffix(".safetensors" if args.save_latents else ".undecoded.safetensors")


def tidy(args: argparse.Namespace, latents: Path) -> None:
    """Delete latents that are decoded, unless the user wants them."""
    if not (args.decode or args.save_latents):
        return latents.unlink(missing_ok=True)
    kept = latents.with_name(latents.name.replace(".undecoded.", "."))
    if args.decode and kept == latents:
        return
    if kept != latents and not kept.exists():
        latents = latents.rename(kept)
    V.say(f"Kept the latents in {latents}; --decode {latents} decodes them again")


def state_file(args: argparse.Namespace) -> Path:
    return args.state or args.resume or args.output_path.with_suffix(".state.safetensors")


def read_latents(args: argparse.Namespace) -> tuple[Recipe, dict[str, Tensor], dict[str, Any]]:
    """What --decode names: its backbone's recipe, latents and the rest of `describe_video`."""
    if several_processes():
        raise ValueError("--decode needs one process; start it without torchrun.")
    latents, about = V.read_tensors(args.decode, "latents")
    V.check_rate(args.output_path, args.fps or about["fps"])
    choose_device(args, get_recipe(about["backbone"]))  # before anything of another model is downloaded
    recipe = get_recipe(about["backbone"], args.model or about["model"])
    if channels := {x.shape[1] for x in latents.values()} - {recipe.latent[0]}:
        raise ValueError(
            f"{args.decode} holds latents of {channels.pop()} channels, and those of {recipe.model} have "
            f"{recipe.latent[0]}; use the --model that made them."
        )
    return recipe, latents, about


def describe_video(args: argparse.Namespace, run: runs.Run) -> dict[str, Any]:
    """What must be known to decode saved latents, and what the video's file should say."""
    recipe, story = run.plan.recipe, run.story
    about = dict(backbone=args.backbone, model=args.model, num_frames=recipe.num_frames, fps=recipe.fps)
    about |= dict(captions=recipe.captions, run=run.about(), spans=run.spans)
    return about | {"global": story.global_prompt, "local": story.local_prompts}
