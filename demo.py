"""Make a long video of several events from one command.

    python demo.py                            the embedded tiny model, on any laptop
    python demo.py --compare                  Gen-L-Video and SynCoS from the same noise
    python demo.py --backbone cogvideox       CogVideoX-2B, on a GPU
    python demo.py --backbone cogvideox --global_prompt "A red fox." --prompt "It runs. | It jumps."

Writes the video and, beside it, a contact sheet (PNG) with each event's prompt above its frames.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"demo.py needs Python 3.11 or newer, this is {sys.version.split()[0]}.")

import argparse
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = "(default: the backbone's)"

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="tiny",
        help="tiny (default), tiny-unet, cogvideox, cogvideox-5b, opensora-plan, wan, videocrafter2")  # fmt: skip
    add("--model", help=f"hub id or folder of a pipeline in diffusers format {own}")
    add("--device", help="cuda, mps or cpu (default: the best available)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help=f"{own}; float32 on a CPU")
    add("--offload", choices=["none", "model", "sequential"], default="none",
        help="keep parts of the model off the GPU: less memory, slower (default: none)")  # fmt: skip
    add("--window_batch", type=int, help=f"windows per call of the model, at most {own}")
    for name, unit in dict(height="pixels", width="pixels", window_frames="video frames").items():
        add(f"--{name}", type=int, help=f"size of the base clip in {unit}; not for cogvideox {own}")
    add("--vae_tiling", action="store_true", help="decode in spatial tiles: less memory, slower")

    add = parser.add_argument_group("story (one of these; default: the backbone's scenario)").add_argument
    add("--prompt", help='local prompts, one per event, separated by "|"')
    add("--global_prompt", default="", help="what stays the same throughout (with --prompt)")
    add("--story", metavar="FILE", help='JSON file: {"global": "...", "local": ["...", ...]}')
    add("--scenario", metavar="NAME", help="a ready-made story, see --list_scenarios")
    add("--list_scenarios", action="store_true", help="print the ready-made stories and stop")

    add = parser.add_argument_group("method").add_argument
    add("--method", metavar="NAME", default="syncos",
        help="syncos (default), gen-l-video, stage-2-alone, fifo, ditctrl, ditctrl-sde, csd, "
            "video-infinity")  # fmt: skip
    add("--ablate", nargs="+", metavar="PART", default=[],
        help="remove parts of SynCoS: stage-1, stage-2, stage-2-keep-noise, stage-3, grounded-timestep, fixed-noise, "
             "t-min, structured-prompt")  # fmt: skip
    add("--compare", nargs="*", metavar="METHOD",
        help="methods side by side, from the same noise (default: gen-l-video syncos)")  # fmt: skip
    add("--num_frames", type=int, help=f"video frames {own}")
    add("--num_inference_steps", type=int, help=f"denoising steps {own}")
    add("--guidance_scale", type=float, help=f"classifier-free guidance {own}")
    add("--stride", type=int, help=f"latent frames between windows {own}")
    add("--csd_iters", type=int, help=f"stage 2: iterations per step {own}")
    add("--csd_lr", type=float, help=f"stage 2: AdamW's learning rate {own}")
    add("--csd_batch", type=int, help=f"stage 2: windows per minibatch {own}")
    add("--t_min", type=float, help=f"stage 2 runs while t > t_min {own}")
    add("--seed", type=int, default=0, help="same seed, same video (default: 0)")

    add = parser.add_argument_group("output").add_argument
    add("--output_path", type=Path, default=Path("output.mp4"), help=".mp4, .gif or .webp (default: output.mp4)")
    add("--captions", action=argparse.BooleanOptionalAction, help=f"the current event's prompt under the picture {own}")
    add("--fps", type=float, help=f"frames per second {own}")
    add("--save_latents", action="store_true", help="keep the latents (.safetensors beside the video)")
    add("--trace", type=Path, metavar="FILE", help="how the estimates developed (.safetensors); "
        "python -m extras.measure.evaluate --trajectories FILE draws it")  # fmt: skip
    add("--decode", type=Path, metavar="FILE", help="decode saved latents; no sampling")
    add("--plan", action="store_true", help="print the plan and stop")

    add = parser.add_argument_group(
        "long runs (torchrun --nproc_per_node N demo.py ... uses several GPUs)"
    ).add_argument
    add("--state", type=Path, metavar="FILE", help="save the state after every step, to resume after a stop "
        "(default: when stopped by Ctrl-C or a lack of memory; after every step on several GPUs)")  # fmt: skip
    add("--resume", type=Path, metavar="FILE", help="continue a run that was saved in FILE, with the same options")
    add("--preview", type=int, metavar="K", help="a picture of the estimate so far every K steps")
    add("--compile", action="store_true", help="torch.compile the model: minutes at first, once more for batches of "
        "another size (--window_batch above 1), then faster; not with --offload sequential")  # fmt: skip
    return parser


if __name__ == "__main__":  # parse first, import after: --help and a mistyped option answer at once
    ARGS = make_parser().parse_args()

import json
import signal
import warnings
from dataclasses import replace
from typing import NoReturn

import torch

from backbones import Backbone, Recipe
from extras import runs
from extras import videos as V
from extras.baselines import Method, Plan
from extras.methods import METHODS, SynCoS
from extras.models import get_recipe
from prompts import SCENARIOS, Story, load_story, parse_events
from syncos import ABLATIONS, Settings

LIMITS = {  # of numbers, both ends included; syncos.Settings checks the others
    "seed": (0, 2**64 - 1), "num_inference_steps": (1, 1000), "t_min": (-1, 1000), "num_frames": (1, 10**6),
    "guidance_scale": (0, 100), "csd_lr": (0, 100), "fps": (0.01, 1000), "window_batch": (1, 10**6),
    "height": (1, 10**4), "width": (1, 10**4), "window_frames": (1, 10**4), "preview": (1, 10**6),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The plan: everything that can be known, and refused, before a model is loaded. All of this raises
# ValueError, one sentence that says what is wrong and what to do.


def plan_run(args: argparse.Namespace) -> runs.Run:
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} must be a number from {low} to {high}, got {value}.")
    recipe = choose_recipe(args)
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
    settings = replace(recipe.settings, **pick("stride", "csd_iters", "csd_lr", "csd_batch", "t_min"))
    chosen = pick("num_frames", "num_inference_steps", "guidance_scale", "fps", "window_batch", "captions")
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
    return bool(args.state or args.resume or runs.several_processes())


def state_file(args: argparse.Namespace) -> Path:
    return args.state or args.resume or args.output_path.with_suffix(".state.safetensors")


# --------------------------------------------------------------------------------------------------
# The run


def load(args: argparse.Namespace, recipe: Recipe, device: str, dtype: torch.dtype) -> Backbone:
    return recipe.backbone(recipe.model, device, dtype, recipe.guidance_scale, args.offload, args.vae_tiling)


def sample(args: argparse.Namespace, run: runs.Run, backbone: Backbone, state: runs.State) -> tuple[dict, dict]:
    """Latents of each method, and what the video's file should know; saved before decoding."""
    recipe, story = run.plan.recipe, run.story

    def look(method: str, step: int, x0: torch.Tensor) -> None:
        if args.preview and runs.main_process() and (step + 1) % args.preview == 0:
            title = f"{method}, estimate after step {step + 1} of {run.methods[method].steps(run.plan)}"
            runs.preview(args.output_path.with_suffix(".preview.png"), run, backbone, x0, title)

    about = dict(backbone=args.backbone, model=args.model, num_frames=recipe.num_frames, fps=recipe.fps)
    about |= dict(captions=recipe.captions, run=run.about(), spans=run.plan.spans)
    about |= {"global": story.global_prompt, "local": story.local_prompts}
    try:
        latents = runs.sample(run, backbone, state, state_file(args) if keeps_state(args) else None, look)
        runs.leave_processes()
        if not runs.main_process():
            sys.exit()
        V.write_tensors(latents_file(args), "latents", latents, about)
        if args.trace:
            V.write_tensors(args.trace, "trace", state.traces(), about)
    except runs.TROUBLE as error:
        raise runs.stopped(error, runs.keep_state(state, state_file(args))) from None
    if keeps_state(args):
        state_file(args).unlink(missing_ok=True)
    return latents, about


def write(args: argparse.Namespace, backbone: Backbone, latents: dict, about: dict, safe: Path) -> None:
    """The video and its contact sheet; `safe` holds the latents for another attempt."""
    fps, events = args.fps or about["fps"], list(zip(about["spans"], about["local"]))
    captions = about["captions"] if args.captions is None else args.captions
    comment = json.dumps(about["run"])  # how it was made, for whoever finds the video later
    try:
        streams = {name: backbone.decode(x) for name, x in latents.items()}
        V.write_story(args.output_path, streams, about["num_frames"], fps, events, about["global"], captions, comment)
    except runs.TROUBLE as error:
        tiles = " --vae_tiling" * (isinstance(error, torch.OutOfMemoryError) and "cogvideox" in about["backbone"])
        raise runs.stopped(error, f"The latents are safe; --decode {safe}{tiles} continues.") from None


def refuse(error: ValueError) -> NoReturn:
    if runs.main_process():
        print(f"demo.py: {error}", file=sys.stderr)
    sys.exit(2)


def main(args: argparse.Namespace) -> None:
    """Options, plan, sample, write."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a prompt's letters
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what cluster schedulers send acts as Ctrl-C
    if args.list_scenarios:
        for name, story in SCENARIOS.items():
            V.say("\n    ".join([name, story.global_prompt, *(f"- {text}" for text in story.local_prompts)]))
        return
    try:
        check_files(args)
        if args.decode:
            latents, about = V.read_tensors(args.decode, "latents")
            recipe = get_recipe(about["backbone"], args.model or about["model"])
            device, dtype = choose_device(args, recipe)
        else:
            args.device = runs.join_processes(args.device)
            run = plan_run(args)
            recipe, device, dtype = run.plan.recipe, run.device, run.dtype
            state = runs.State.read(args.resume, run.about()) if args.resume else runs.State(run.about())
            if args.plan:
                return V.say(f"{run.describe()}\n{V.missing_device(device)}".strip())
        if missing := V.missing_device(device):
            raise ValueError(missing)
        backbone = load(args, recipe, device, dtype)
        if not args.decode:
            V.say(f"{run.describe()}\nLoading {recipe.model}")
            runs.encode(backbone, run.plan.texts)
        backbone.load(decoder_only=bool(args.decode))
        if args.compile and not args.decode:
            backbone.pipe.transformer.compile()
    except ValueError as error:
        refuse(error)
    except runs.TROUBLE as error:
        raise runs.stopped(error) from None

    if args.decode:
        return write(args, backbone, latents, about, args.decode)
    latents, about = sample(args, run, backbone, state)
    backbone.release_transformer()
    write(args, backbone, latents, about, saved := latents_file(args))
    if args.save_latents:
        V.say(f"Kept the latents in {saved}; --decode {saved} decodes them again")
    else:
        saved.unlink(missing_ok=True)


if __name__ == "__main__":
    main(ARGS)
