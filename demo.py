"""Make a long video of several events from one command.

    python demo.py                            the embedded tiny model, on any laptop
    python demo.py --compare                  Gen-L-Video and SynCoS from the same noise
    python demo.py --backbone cogvideox       CogVideoX-2B, on a GPU
    python demo.py --backbone cogvideox --global_prompt "A red fox." --prompt "It runs. | It jumps."

Writes the video and, beside it, a contact sheet (PNG) with each event's prompt above its frames.
"""

import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"demo.py needs Python 3.11 or newer, this is {sys.version.split()[0]}.")

import argparse
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    kind, both = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser("demo.py", description=__doc__, formatter_class=kind)
    own, flag = "(default: the backbone's)", dict(action="store_const", const=True)  # None: not given
    add = parser.add_argument_group("model").add_argument
    add("--backbone",
        help="tiny (default), tiny-unet, cogvideox, cogvideox-5b, cogvideox-1.5, opensora-plan, wan, "
             "videocrafter2")  # fmt: skip
    add("--model", help=f"hub id or folder of a pipeline in diffusers format {own}")
    add("--device", help="cuda, mps or cpu (default: the best available)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help=f"{own}; float32 on a CPU")
    add("--offload", choices=["none", "model", "sequential"],
        help="keep parts of the model off the GPU: less memory, slower (default: none)")  # fmt: skip
    add("--window_batch", type=int, help=f"windows per call of the model, at most {own}")
    for name, unit in dict(height="pixels", width="pixels", window_frames="video frames").items():
        add(f"--{name}", type=int, help=f"size of the base clip in {unit}; not for cogvideox {own}")
    add("--vae_tiling", **flag, help="decode in spatial tiles: less memory, slower")

    add = parser.add_argument_group("story (one of these; default: the backbone's scenario)").add_argument
    add("--prompt", help='local prompts, one per event, separated by "|"')
    add("--global_prompt", help="what stays the same throughout (with --prompt)")
    add("--story", metavar="FILE", help='JSON file: {"global": "...", "local": ["...", ...]}, "durations" if wanted')
    add("--scenario", metavar="NAME", help="a ready-made story, see --list_scenarios")
    add("--durations", type=float, nargs="+", metavar="N",
        help="how long each event lasts, relative to the others: 3 2 2 5 (default: equally long)")  # fmt: skip
    add("--list_scenarios", **flag, help="print the ready-made stories and stop")

    add = parser.add_argument_group("method").add_argument
    add("--method", metavar="NAME", help="syncos (default), gen-l-video, stage-2-alone, csd, fifo, ditctrl, "
        "ditctrl-sde, video-infinity")  # fmt: skip
    add("--ablate", nargs="+", metavar="PART",
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
    add("--shared_noise", action=both, help=f"give all windows the same noise, each in another order {own}")
    add("--seed", type=int, help="same seed, same video (default: 0)")

    add = parser.add_argument_group("output").add_argument
    add("--output_path", type=Path, help=".mp4, .gif or .webp (default: output.mp4)")
    add("--captions", action=both, help=f"the current event's prompt under the picture {own}")
    add("--fps", type=float, help=f"frames per second {own}")
    add("--save_latents", **flag, help="keep the latents (.safetensors beside the video)")
    add("--trace", type=Path, metavar="FILE", help="how the estimates developed (.safetensors); "
        "python -m extras.measure.evaluate --trajectories FILE draws it")  # fmt: skip
    add("--decode", type=Path, metavar="FILE", help="decode saved latents; no sampling")
    add("--plan", **flag, help="print the plan and stop")

    add = parser.add_argument_group("long runs (torchrun --nproc_per_node N demo.py uses several GPUs)").add_argument
    add("--state", type=Path, metavar="FILE", help="where the state is saved after every step, to resume after a stop "
        "(.safetensors; default: beside the video)")  # fmt: skip
    add("--resume", type=Path, metavar="FILE", help="continue a run that was saved in FILE, with the same options")
    add("--preview", type=int, metavar="K", help="a picture of the estimate so far every K steps")
    add("--compile", **flag, help="torch.compile the model: minutes at first, once more for batches of "
        "another size (--window_batch above 1), then faster; not with --offload sequential")  # fmt: skip
    return parser


if __name__ == "__main__":  # parse first, import after: --help and a mistyped option answer at once
    ARGS = make_parser().parse_args()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Python's imports would answer with pages
        signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped."))
    import extras  # noqa: F401, it names packages that are missing or too old

import warnings
from dataclasses import replace
from typing import NoReturn

import torch

from backbones import Backbone, Recipe
from extras import devices, options, runs
from extras import videos as V
from extras.endings import Ending, catch_signals, lacks_memory
from extras.meeting import main_process, numbered
from extras.processes import encode, join_processes, leave_processes
from extras.states import State


def main(args: argparse.Namespace) -> None:
    """Options, plan, sample, write."""
    prepare()
    with Ending() as ending:
        try:
            args = options.settle(args)
            if args.list_scenarios:
                return V.say(options.list_scenarios())
            options.check_files(args)
            if args.decode:
                recipe, latents, about = options.read_latents(args)
                backbone = load(args, recipe, *options.choose_device(args, recipe), None)
            else:
                run = options.plan_run(args)
                state = State.read(args.resume, run.about()) if args.resume else State(run.about())
                if args.plan:
                    return V.say(f"{run.describe()}\n{devices.missing_device(run.device)}".strip())
                run = replace(run, device=join_processes(run.device))
                backbone = load(args, run.plan.recipe, run.device, run.dtype, run)
                state.claim(options.state_file(args), args.resume)
        except ValueError as error:
            refuse(error)
        if not args.decode:
            latents, about = sample(args, run, backbone, state, ending)
        write(args, backbone, latents, about, ending)


def prepare() -> None:
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    V.open_streams(quiet=not main_process())
    catch_signals()


def refuse(error: ValueError) -> NoReturn:
    print(numbered(f"demo.py: {error}"), file=sys.stderr)
    sys.exit(2)


def load(args: argparse.Namespace, recipe: Recipe, device: str, dtype: torch.dtype, run: runs.Run | None) -> Backbone:
    """A backbone that is ready to sample a run, or else to decode."""
    if run and args.compile:
        devices.check_compile(device)
    backbone = recipe.make(device, dtype, offload=args.offload, tiling=args.vae_tiling)
    if run:
        V.say(f"{run.describe()}\nLoading {recipe.model}")
        encode(backbone, run.plan.texts)
    backbone.load(decoder_only=not run)
    if run and args.compile:
        backbone.pipe.transformer.compile()
    return backbone


def sample(
    args: argparse.Namespace, run: runs.Run, backbone: Backbone, state: State, ending: Ending
) -> tuple[dict, dict]:
    """Latents of each method, and what the video's file should know; saved before decoding."""
    file, about = options.state_file(args), options.describe_video(args, run)
    ending.keep = lambda error: state.keep(file)
    if run.plan.recipe.needs_gpu:
        V.say(f"The state is saved after every step in {file}")

    def look(method: str, step: int, x0: torch.Tensor) -> None:
        if args.preview and main_process() and (step + 1) % args.preview == 0:
            title = f"{method}, estimate after step {step + 1} of {run.methods[method].steps(run.plan)}"
            runs.preview(args.output_path.with_suffix(".preview.png"), run, backbone, x0, title)

    latents = runs.sample(run, backbone, state, file, look)
    leave_processes()
    if not main_process():
        sys.exit()
    if args.trace:
        V.write_tensors(args.trace, "trace", state.traces(), about, new=True)
    V.write_tensors(options.latents_file(args), "latents", latents, about, new=True)
    file.unlink(missing_ok=True)
    return latents, about


def write(args: argparse.Namespace, backbone: Backbone, latents: dict, about: dict, ending: Ending) -> None:
    """The video and its contact sheet, from latents that are on disk."""
    file = args.decode or options.latents_file(args)
    tiles = " --vae_tiling" * ("cogvideox" in about["backbone"])
    ending.keep = lambda error: f"The latents are safe; --decode {file}{tiles * lacks_memory(error)} continues."
    fps, events = args.fps or about["fps"], list(zip(about["spans"], about["local"]))
    captions = about["captions"] if args.captions is None else args.captions
    if not args.decode:
        backbone.release_transformer()
    streams = {name: backbone.decode(x) for name, x in latents.items()}
    V.write_story(args.output_path, streams, about["num_frames"], fps, events, about["global"], captions, about["run"])
    options.tidy(args, file)


if __name__ == "__main__":
    main(ARGS)
