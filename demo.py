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
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("demo.py", description=__doc__, formatter_class=kind)
    own = "(default: the backbone's)"
    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="tiny",
        help="tiny (default), tiny-unet, cogvideox, cogvideox-5b, cogvideox-1.5, opensora-plan, wan, "
             "videocrafter2")  # fmt: skip
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

    add = parser.add_argument_group("long runs (torchrun --nproc_per_node N demo.py uses several GPUs)").add_argument
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
from typing import NoReturn

import torch

from backbones import Backbone, Recipe
from extras import options, runs
from extras import videos as V
from extras.processes import encode, join_processes, leave_processes, main_process
from prompts import SCENARIOS


def main(args: argparse.Namespace) -> None:
    """Options, plan, sample, write."""
    prepare()
    if args.list_scenarios:
        for name, story in SCENARIOS.items():
            V.say("\n    ".join([name, story.global_prompt, *(f"- {text}" for text in story.local_prompts)]))
        return
    try:
        options.check_files(args)
        if args.decode:
            recipe, latents, about = options.read_latents(args)
            backbone = load(args, recipe, *options.choose_device(args, recipe), None)
        else:
            args.device = join_processes(args.device)
            run = options.plan_run(args)
            state = runs.State.read(args.resume, run.about()) if args.resume else runs.State(run.about())
            if args.plan:
                return V.say(f"{run.describe()}\n{V.missing_device(run.device)}".strip())
            backbone = load(args, run.plan.recipe, run.device, run.dtype, run)
    except ValueError as error:
        refuse(error)
    except runs.TROUBLE as error:
        raise runs.stopped(error) from None

    if args.decode:
        return write(args, backbone, latents, about, args.decode)
    latents, about = sample(args, run, backbone, state)
    backbone.release_transformer()
    write(args, backbone, latents, about, saved := options.latents_file(args))
    if args.save_latents:
        V.say(f"Kept the latents in {saved}; --decode {saved} decodes them again")
    else:
        saved.unlink(missing_ok=True)


def prepare() -> None:
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a prompt's letters
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what cluster schedulers send acts as Ctrl-C


def refuse(error: ValueError) -> NoReturn:
    if main_process():
        print(f"demo.py: {error}", file=sys.stderr)
    sys.exit(2)


def load(args: argparse.Namespace, recipe: Recipe, device: str, dtype: torch.dtype, run: runs.Run | None) -> Backbone:
    """A backbone that is ready to sample a run, or else to decode."""
    if missing := V.missing_device(device):
        raise ValueError(missing)
    backbone = recipe.backbone(recipe.model, device, dtype, recipe.guidance_scale, args.offload, args.vae_tiling)
    if run:
        V.say(f"{run.describe()}\nLoading {recipe.model}")
        encode(backbone, run.plan.texts)
    backbone.load(decoder_only=not run)
    if run and args.compile:
        backbone.pipe.transformer.compile()
    return backbone


def sample(args: argparse.Namespace, run: runs.Run, backbone: Backbone, state: runs.State) -> tuple[dict, dict]:
    """Latents of each method, and what the video's file should know; saved before decoding."""
    file, about = options.state_file(args), options.describe_video(args, run)

    def look(method: str, step: int, x0: torch.Tensor) -> None:
        if args.preview and main_process() and (step + 1) % args.preview == 0:
            title = f"{method}, estimate after step {step + 1} of {run.methods[method].steps(run.plan)}"
            runs.preview(args.output_path.with_suffix(".preview.png"), run, backbone, x0, title)

    try:
        latents = runs.sample(run, backbone, state, file if options.keeps_state(args) else None, look)
        leave_processes()
        if not main_process():
            sys.exit()
        V.write_tensors(options.latents_file(args), "latents", latents, about)
        if args.trace:
            V.write_tensors(args.trace, "trace", state.traces(), about)
    except runs.TROUBLE as error:
        raise runs.stopped(error, runs.keep_state(state, file)) from None
    if options.keeps_state(args):
        file.unlink(missing_ok=True)
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


if __name__ == "__main__":
    main(ARGS)
