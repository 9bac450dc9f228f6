"""Make a long video of several events from one command.

    python demo.py                            the embedded tiny model, on any laptop
    python demo.py --compare                  Gen-L-Video and SynCoS side by side, from the same noise
    python demo.py --backbone cogvideox       CogVideoX-2B, on a GPU
    python demo.py --backbone cogvideox --global_prompt "A red fox in the snow." --prompt "It runs. | It jumps."

Writes the video and, beside it, a contact sheet (PNG) with each event's prompt above its frames.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"demo.py needs Python 3.11 or newer, this is {sys.version.split()[0]}.")

import argparse
import atexit
import json
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import prompts as P
import videos as V

PRESETS = {  # options as they are unless given; the paper's t_min is the model's, `Recipe.paper_t_min`
    "paper": dict(num_inference_steps=50, csd_iters=20),
    "fast": dict(csd_iters=2),  # ours: most of the coherence for few evaluations (measure/reproduce.py chart)
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = "(default: the backbone's)"

    group = parser.add_argument_group("model")
    group.add_argument(
        "--backbone", default="tiny", help="tiny (default), cogvideox, cogvideox-5b, opensora-plan, wan, videocrafter2"
    )
    group.add_argument("--model", help=f"hub id or folder of a pipeline in diffusers format {own}")
    group.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    group.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help=f"{own}; float32 on a CPU")
    group.add_argument("--offload", choices=["none", "model", "sequential"], default="none",
                       help="keep parts of the model off the GPU: less memory, slower (default: none)")  # fmt: skip
    group.add_argument("--window_batch", type=int, help=f"most windows that go through the model at once {own}")
    for name, unit in dict(height="pixels", width="pixels", window_frames="video frames").items():
        group.add_argument(f"--{name}", type=int, help=f"of the base clip, in {unit}; not cogvideox {own}")
    group.add_argument("--vae_tiling", action="store_true", help="decode in spatial tiles: less memory, slower")

    group = parser.add_argument_group("story (one of; default: the backbone's scenario)")
    group.add_argument("--prompt", help='local prompts, one an event, separated by "|"')
    group.add_argument("--global_prompt", default="", help="what stays the same throughout (with --prompt)")
    group.add_argument("--story", metavar="FILE", help='JSON file: {"global": "...", "local": ["...", ...]}')
    group.add_argument("--scenario", metavar="NAME", help="a ready story, see --list_scenarios")
    group.add_argument("--list_scenarios", action="store_true", help="print the ready stories and stop")

    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=["syncos", "gen-l-video", "fifo", "csd"], default="syncos")
    group.add_argument("--ablate", nargs="+", metavar="PART", default=[],
                       help="take parts of SynCoS away: stage-1, stage-2, stage-2-keep-noise, stage-3, "
                            "grounded-timestep, fixed-noise, t-min, structured-prompt")  # fmt: skip
    group.add_argument("--compare", nargs="*", metavar="METHOD",
                       help="methods side by side, from the same noise (default: gen-l-video syncos)")  # fmt: skip
    group.add_argument("--preset", choices=PRESETS,
                       help="paper: the paper's settings; fast: ours, 2 iterations of stage 2 a step")  # fmt: skip
    group.add_argument("--num_frames", type=int, help=f"video frames {own}")
    group.add_argument("--num_inference_steps", type=int, help=f"denoising steps {own}")
    group.add_argument("--guidance_scale", type=float, help=f"classifier-free guidance {own}")
    group.add_argument("--stride", type=int, help=f"latent frames between windows {own}")
    group.add_argument("--csd_iters", type=int, help=f"stage 2: iterations a step {own}")
    group.add_argument("--csd_lr", type=float, help=f"stage 2: AdamW's learning rate {own}")
    group.add_argument("--csd_batch", type=int, help=f"stage 2: windows a minibatch {own}")
    group.add_argument("--t_min", type=float, help=f"stage 2 runs while t > t_min {own}")
    group.add_argument("--causal", action=argparse.BooleanOptionalAction,
                       help=f"fuse without the first latent frame of windows; ours {own}")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="same seed, same video (default: 0)")

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_path", type=Path, default=Path("output.mp4"), help=".mp4, .gif or .webp (default: output.mp4)"
    )
    group.add_argument("--captions", action=argparse.BooleanOptionalAction,
                       help=f"the prompt of the event that plays, under the picture {own}")  # fmt: skip
    group.add_argument("--fps", type=int, help=f"frames per second {own}")
    group.add_argument("--save_latents", action="store_true", help="keep the latents (.safetensors beside the video)")
    group.add_argument("--trace", type=Path, metavar="FILE", help="how the estimates developed (.safetensors); "
                       "measure/evaluate.py --trajectories FILE draws it")  # fmt: skip
    group.add_argument("--decode", type=Path, metavar="FILE", help="decode saved latents; no sampling")
    group.add_argument("--plan", action="store_true", help="print the plan and stop")

    group = parser.add_argument_group("long runs (torchrun --nproc_per_node N demo.py ... uses several GPUs)")
    group.add_argument("--state", type=Path, metavar="FILE", help="save the state of the run, to go on after a stop "
                       "(default: only if stopped by Ctrl-C or a lack of memory)")  # fmt: skip
    group.add_argument("--save_every", type=int, default=1, metavar="K", help="save it every K steps (default: 1)")
    group.add_argument("--resume", type=Path, metavar="FILE", help="go on where FILE was saved, with the same options")
    group.add_argument("--preview", type=int, metavar="K", help="a picture of the estimate so far every K steps")
    group.add_argument("--compile", action="store_true", help="torch.compile the model: minutes at first, then faster")
    return parser


LIMITS = {  # of numbers, both ends included; what settings must fulfil besides, `syncos.Settings` checks
    "seed": (0, 2**64 - 1), "num_inference_steps": (1, 1000), "t_min": (-1, 1000), "num_frames": (1, 10**6),
    "guidance_scale": (0, 100), "csd_lr": (0, 100), "fps": (1, 1000), "window_batch": (1, 10**6),
    "height": (1, 10**4), "width": (1, 10**4), "window_frames": (1, 10**4), "save_every": (1, 10**6),
    "preview": (1, 10**6),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The plan: everything that can be known, and refused, before a model is loaded


@dataclass(frozen=True)
class Plan:
    recipe: Any  # backbones.Recipe, with the user's choices
    story: P.Story
    methods: dict[str, Any]  # name -> syncos.Settings; "fifo": fifo.FifoSettings
    windows: list[slice]
    events: list[int]  # of each window
    prompts: list[str]  # of each window
    frames: int  # latent frames
    device: str
    dtype: Any
    seed: int

    def steps(self, name: str) -> int:
        """Of a method, as its callback counts them."""
        from fifo import count_turns

        steps = self.recipe.num_inference_steps
        return count_turns(steps, self.recipe.window, self.frames) if name == "fifo" else steps

    def evaluations(self, name: str, levels: list, steps: int) -> int:
        """Of a method in its first steps."""
        import fifo
        import syncos

        settings, size = self.methods[name], self.recipe.window
        if name == "fifo":
            return fifo.count_evaluations(len(levels) - 1, size, steps, settings) if steps else 0
        return syncos.count_evaluations(levels[: steps + 1], self.windows, settings)

    def about(self) -> dict[str, Any]:
        """Everything that shapes the latents, as JSON has it."""
        r = self.recipe
        about = dict(model=r.model, dtype=str(self.dtype), seed=self.seed, frames=self.frames, window=r.window)
        about |= dict(latent=r.latent, steps=r.num_inference_steps, guidance_scale=r.guidance_scale)
        about |= dict(prompts=self.prompts, methods={name: asdict(s) for name, s in self.methods.items()})
        return json.loads(json.dumps(about))

    def describe(self) -> str:
        from syncos import refine_levels

        r, settings = self.recipe, next((s for name, s in reversed(self.methods.items()) if name != "fifo"), None)
        levels = r.backbone.make_levels(r.scheduler, r.num_inference_steps)
        lines = [
            f"{r.model} on {self.device}, {str(self.dtype).removeprefix('torch.')}, guidance {r.guidance_scale:g}, "
            f"seed {self.seed}",
            f"{(self.frames - 1) * r.frames_per_latent + 1} frames at {r.fps} fps = {self.frames} latent frames",
            f"{r.num_inference_steps} steps",
        ]
        refined = []
        if settings:
            lines[1] += f": {len(self.windows)} windows of {r.window}, stride {settings.stride}"
            refined = [x for i, x in enumerate(levels[:-1]) if x.alpha > 0 and refine_levels(i, levels, settings)]
        if refined:
            lines[-1] += f"; stage 2 above t = {settings.t_min:g}, in {len(refined)} of them, down to alpha/sigma = "
            lines[-1] += f"{refined[-1].alpha / refined[-1].sigma:.2g}: {settings.csd_iters} iterations of "
            lines[-1] += f"{min(settings.csd_batch, len(self.windows))} windows, learning rate {settings.csd_lr:g}"
        elif settings and settings.refine:
            lines[-1] += f"; stage 2 never runs, for no t of the walk is above t_min = {settings.t_min:g}"
        for name in self.methods:
            turns = f", in {self.steps(name)} turns of its queue" * (name == "fifo")
            evaluations = self.evaluations(name, levels, self.steps(name))
            lines.append(f"{name}: {evaluations} model evaluations (windows){turns}")
        if self.story.global_prompt:
            lines.append(f"global: {self.story.global_prompt}")
        of, events = "window", self.events
        if not settings:
            of, events = "latent frame", P.frame_events(self.windows, self.events)
        for i, text in enumerate(self.story.local_prompts):
            mine = [n + 1 for n, event in enumerate(events) if event == i]
            which = f"{of}s {mine[0]} to {mine[-1]}" if len(mine) > 1 else f"{of} {mine[0]}"
            lines.append(f"event {i + 1}, {which}: {text}")
        return "\n".join(lines)


def choose_story(args: argparse.Namespace, default: str) -> P.Story:
    given = [name for name in ("prompt", "story", "scenario") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"Give one story: --{given[0]} or --{given[1]}, not both.")
    if args.global_prompt and given != ["prompt"]:
        raise ValueError("--global_prompt goes with --prompt; a story file or scenario has its own.")
    if args.prompt is not None:
        return P.parse_events(args.prompt, args.global_prompt)
    if args.story is not None:
        return P.load_story(args.story)
    name = args.scenario or default
    if name not in P.SCENARIOS:
        raise ValueError(f"There is no scenario {name}; --list_scenarios shows them all.")
    return P.SCENARIOS[name]


def choose_device(args: argparse.Namespace, recipe: Any) -> tuple[str, Any]:
    """The device, which need not be there, and the dtype to run a recipe with. Raises ValueError."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = args.device or ("cuda" if best == "cpu" and recipe.needs_gpu else best)
    kind = V.device_kind(device)
    if kind == "cpu" and args.offload != "none":
        raise ValueError("--offload moves parts of the model between GPU and CPU; on the CPU leave it out.")
    return device, getattr(torch, args.dtype or ("float32" if kind == "cpu" else recipe.dtype))


def choose_methods(args: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The settings of each method that is asked for. Raises ValueError."""
    from fifo import FifoSettings
    from syncos import ABLATIONS, METHODS

    known = [*ABLATIONS, "structured-prompt"]
    if unknown := [part for part in args.ablate if part not in known]:
        raise ValueError(f"--ablate {unknown[0]} is not known; choose from {', '.join(known)}.")
    if args.ablate and (args.method != "syncos" or args.compare is not None):
        raise ValueError("--ablate takes parts of SynCoS away; it goes with neither another --method nor --compare.")
    names = [args.method] if args.compare is None else args.compare or ["gen-l-video", "syncos"]
    if unknown := [name for name in names if name not in [*METHODS, "fifo"]]:
        raise ValueError(f"--compare {unknown[0]} is not known; choose from {', '.join([*METHODS, 'fifo'])}.")
    methods = {name: FifoSettings() if name == "fifo" else replace(settings, **METHODS[name]) for name in names}
    for part in args.ablate:
        [(name, settings)] = methods.items()
        methods = {f"{name} w/o {part}": replace(settings, **ABLATIONS.get(part, {}))}
    return methods


def latent_frames(num_frames: int, recipe: Any) -> int:
    """Latent frames of `num_frames` video frames. Raises ValueError if the model cannot make so many."""
    c, step = recipe.frames_per_latent, recipe.frames_step
    least = -(-(recipe.window - 1) * c // step) * step + 1
    if (num_frames - 1) % step or num_frames < least:
        nearest = max(step * round((num_frames - 1) / step) + 1, least)
        raise ValueError(
            f"--num_frames {num_frames} fits no window plan: it must be {f'{step} n + 1 and ' * (step > 1)}at least "
            f"{least}; the nearest is {nearest}."
        )
    return (num_frames - 1) // c + 1


def check_files(args: argparse.Namespace) -> None:
    """Raises ValueError if a file that the run may write cannot be written, or is another of its files."""
    out, safe = args.output_path, (".safetensors",)
    if not out.name:
        raise ValueError("--output_path must name a file, .mp4, .gif or .webp.")
    written = {"the video": (out, (".mp4", ".gif", ".webp")), "its contact sheet": (out.with_suffix(".png"), (".png",))}
    if not args.decode:
        written["the latents"] = latents_file(args), safe
        written["the state"] = args.state or args.resume or out.with_suffix(".state.safetensors"), safe
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


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything and plan the run. Raises ValueError, one sentence that says what is wrong and what to do."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} must be a number from {low} to {high}, got {value}.")

    from backbones import get_recipe
    from fifo import queue_windows
    from syncos import make_windows

    recipe = get_recipe(args.backbone, args.model)
    device, dtype = choose_device(args, recipe)
    presets = dict(PRESETS, paper=PRESETS["paper"] | dict(t_min=recipe.paper_t_min))
    given = presets.get(args.preset, {}) | {k: v for k, v in vars(args).items() if v is not None}
    pick = lambda *names: {k: given[k] for k in names if k in given}  # noqa: E731
    if size := pick("height", "width", "window_frames"):
        c, (_, h, w) = recipe.frames_per_latent, recipe.latent
        own = dict(height=8 * h, width=8 * w, window_frames=c * (recipe.window - 1) + 1)
        recipe = recipe.backbone.resize(recipe, *(own | size).values())
    settings = replace(recipe.settings, **pick("stride", "csd_iters", "csd_lr", "csd_batch", "t_min", "causal"))
    recipe = replace(
        recipe, **pick("num_frames", "num_inference_steps", "guidance_scale", "fps", "window_batch", "captions")
    )

    methods = choose_methods(args, settings)
    if "fifo" in methods:
        if not recipe.backbone.frame_timesteps:
            raise ValueError(f"fifo needs a model that takes a timestep for every frame; {args.backbone} does not.")
        queue_windows(recipe.num_inference_steps, recipe.window, methods["fifo"])
    story = choose_story(args, recipe.scenario)
    frames = latent_frames(recipe.num_frames, recipe)
    windows = make_windows(frames, recipe.window, settings.stride)
    events = P.assign_events(windows, len(story.local_prompts))
    texts = story.event_prompts(structured="structured-prompt" not in args.ablate)
    return Plan(recipe, story, methods, windows, events, [texts[e] for e in events], frames, device, dtype, args.seed)


# ----------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class State:
    """Where a run stands; sampling goes on from it bit for bit."""

    about: dict[str, Any]  # Plan.about
    done: dict[str, Any] = field(default_factory=dict)  # latents of the methods that are finished
    step: int = 0  # steps done of the next one, and what it then had: latents, x0, generator
    now: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, list] = field(default_factory=dict)  # of each method, the small x0 of each step
    saved: bool = False  # is there a file of this run

    def save(self, path: Path) -> None:
        """Raises OSError."""
        tensors = {f"done {k}": v for k, v in self.done.items()} | {f"now {k}": v for k, v in self.now.items()}
        tensors |= {f"trace {k}": v for k, v in self.traces().items()}
        V.write_tensors(path, "state", tensors, dict(step=self.step, about=self.about))
        self.saved = True

    def traces(self) -> dict[str, Any]:
        """Of each method: steps x F x D."""
        import torch

        return {name: torch.stack(steps) for name, steps in self.trace.items()}

    @classmethod
    def read(cls, path: Path, about: dict[str, Any]) -> "State":
        """Raises ValueError if the file is not the state of a run like `about`."""
        tensors, saved = V.read_tensors(path, "state")
        for key, value in about.items():
            if saved["about"].get(key) != value:
                raise ValueError(
                    f"{path} is of another run: {key} was {saved['about'].get(key)} there and is {value} here."
                )
        part = lambda kind: {k.split(" ", 1)[1]: v for k, v in tensors.items() if k.startswith(kind)}  # noqa: E731
        traces = {name: list(trace) for name, trace in part("trace ").items()}
        return cls(about, part("done "), saved["step"], part("now "), traces, saved=True)


def sample(
    plan: Plan, backbone: Any, state: State, path: Path | None = None, save_every: int = 1, look: Callable | None = None
) -> dict[str, Any]:
    """Latents of each method, F x C x H x W, all from the same initial noise.

    Goes on from `state` and keeps it up to date, in `path` too if there is one; look(method, step, x0) after each step.
    """
    import torch
    from tqdm import tqdm

    from backbones import in_batches
    from fifo import fifo
    from syncos import syncos

    levels = backbone.levels(plan.recipe.num_inference_steps)
    for name, settings in plan.methods.items():
        if name in state.done:
            continue
        generator = torch.Generator().manual_seed(plan.seed)
        latents, x0 = torch.randn(plan.frames, *plan.recipe.latent, generator=generator), None
        if state.step:
            latents, x0 = state.now["latents"], state.now["x0"].to(plan.device)
            generator.set_state(state.now["generator"])

        def keep(step, t, x0, latents, name=name, generator=generator):
            now = dict(latents=latents.cpu(), x0=x0.cpu(), generator=generator.get_state())
            state.step, state.now = step + 1, now
            small = torch.nn.functional.adaptive_avg_pool2d(x0, 4).flatten(1)  # F 16C: enough to see where it goes
            state.trace.setdefault(name, []).append(small.cpu())
            if path and state.step % save_every == 0:
                state.save(path)
            if look:
                look(name, step, x0)

        method, parts = syncos, (plan.windows, plan.prompts)
        if name == "fifo":
            texts, events = dict(zip(plan.events, plan.prompts)), P.frame_events(plan.windows, plan.events)
            method, parts = fifo, (plan.recipe.window, [texts[event] for event in events])
        total, behind = (plan.evaluations(name, levels, n) for n in (plan.steps(name), state.step))
        quiet = not main_process()
        with tqdm(total=total, initial=behind, desc=name, unit="window", smoothing=0.05, disable=quiet) as bar:
            predict_x0 = in_batches(backbone.predict_x0, plan.recipe.window_batch, bar.update)
            args = (levels, *parts, settings, generator, keep, state.step, x0)
            state.done[name] = method(predict_x0, latents.to(plan.device), *args).cpu()
        state.step, state.now = 0, {}
    return state.done


def preview(path: Path, plan: Plan, backbone: Any, x0: Any, title: str) -> None:
    """A contact sheet of the estimate so far: one frame from the middle of each event, of three latent frames each."""
    picked, rows, c = {}, [], plan.recipe.frames_per_latent
    for (start, stop), text in zip(P.event_spans(plan.windows, plan.events), plan.story.local_prompts):
        middle = min(max(round((start + stop) / 2 * plan.frames), 1), plan.frames - 2)
        number = c * middle
        picked[number] = list(backbone.decode(x0[middle - 1 : middle + 2]))[c]
        rows.append(([number], text))
    V.contact_sheet(path, {"": picked}, rows, title)


OUT_OF_MEMORY = (
    "The GPU's memory is not enough. What helps, the cheapest first: --window_batch 1, --vae_tiling (decoding, "
    "CogVideoX), --offload model, --offload sequential (much slower)."
)


def stopped(error: BaseException, safe: str) -> SystemExit:
    """The end of a run that cannot go on: why, in a sentence, and what is safe on disk. One process speaks for all."""
    why = {KeyboardInterrupt: "Stopped."}.get(type(error), str(error) if isinstance(error, OSError) else OUT_OF_MEMORY)
    return SystemExit(f"{why} {safe}".strip() if main_process() else 1)


def run(args: argparse.Namespace, plan: Plan, backbone: Any, state: State) -> None:
    """Sample, save, show. The latents are on disk before decoding starts. Exits with what to do if stopped."""
    import torch

    trouble = (KeyboardInterrupt, OSError, torch.OutOfMemoryError)
    path = args.state or args.resume

    def look(method: str, step: int, x0: Any) -> None:
        if main_process() and (step + 1) % args.preview == 0:
            title = f"{method}, estimate after step {step + 1} of {plan.steps(method)}"
            preview(args.output_path.with_suffix(".preview.png"), plan, backbone, x0, title)

    def keep_state() -> str:
        """Save the state, if there is something to save, and say how to go on."""
        kept = path or args.output_path.with_suffix(".state.safetensors")
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if main_process() and (state.step or state.done):
                state.save(kept)
        except OSError:
            pass  # an earlier step may be safe
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return f"The state is safe; the same command with --resume {kept} goes on." if state.saved else ""

    try:
        latents = sample(
            plan, backbone, state, path if main_process() else None, args.save_every, look if args.preview else None
        )
    except trouble as error:
        raise stopped(error, keep_state()) from None
    leave_processes()
    if not main_process():
        return

    about = dict(
        backbone=args.backbone,
        model=args.model,
        num_frames=plan.recipe.num_frames,
        fps=plan.recipe.fps,
        captions=plan.recipe.captions,
        run=plan.about(),
        spans=P.event_spans(plan.windows, plan.events),
        **{"global": plan.story.global_prompt, "local": plan.story.local_prompts},
    )
    saved = latents_file(args)
    try:
        V.write_tensors(saved, "latents", latents, about)
        if args.trace:
            V.write_tensors(args.trace, "trace", state.traces(), about)
    except trouble as error:
        raise stopped(error, keep_state()) from None
    if path:
        path.unlink(missing_ok=True)

    backbone.release_transformer()
    decode(args, backbone, latents, about, saved)
    if args.save_latents:
        V.say(f"Kept the latents in {saved}; --decode {saved} decodes them again")
    else:
        saved.unlink(missing_ok=True)


def decode(args: argparse.Namespace, backbone: Any, latents: dict[str, Any], about: dict[str, Any], safe: Path) -> None:
    """The video and its contact sheet; `safe` is where the latents can be decoded from again."""
    import torch

    fps, events = args.fps or about["fps"], list(zip(about["spans"], about["local"]))
    captions = about["captions"] if args.captions is None else args.captions
    comment = json.dumps(about["run"])  # how it was made, for whoever finds the video later
    try:
        streams = {name: backbone.decode(x) for name, x in latents.items()}
        V.write_story(args.output_path, streams, about["num_frames"], fps, events, about["global"], captions, comment)
    except (KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        tiles = " --vae_tiling" * (isinstance(error, torch.OutOfMemoryError) and "cogvideox" in about["backbone"])
        raise stopped(error, f"The latents are safe; --decode {safe}{tiles} goes on.") from None


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun: meet the others; each takes its own GPU, and the first alone writes and prints."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available() and args.device in (None, "cuda")
    if gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))  # previews may take the first long
    atexit.register(leave_processes)
    if not main_process():
        sys.stdout = open(os.devnull, "w")


def leave_processes() -> None:
    """All at once, for with NCCL each may wait for the others: before the first decodes alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def load(args: argparse.Namespace, recipe: Any, device: str, dtype: Any) -> Any:
    """The backbone. Raises ValueError if there is no such model."""
    return recipe.backbone(recipe.model, device, dtype, recipe.guidance_scale, args.offload, args.vae_tiling)


def start(args: argparse.Namespace) -> Callable[[], None]:
    """Check, plan and load; returns what is left to do. Raises ValueError if something is wrong with what was asked."""
    import torch

    from backbones import get_recipe

    check_files(args)
    if args.decode:
        latents, about = V.read_tensors(args.decode, "latents")
        recipe = get_recipe(about["backbone"], args.model or about["model"])
        device, dtype = choose_device(args, recipe)
        V.check_device(device)
        backbone = load(args, recipe, device, dtype)
        backbone.load(decoder_only=True)
        return lambda: decode(args, backbone, latents, about, args.decode)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        join_processes(args)
    plan = make_plan(args)
    state = State.read(args.resume, plan.about()) if args.resume else State(plan.about())
    if not args.plan:
        V.check_device(plan.device)
    V.say(plan.describe())
    if args.plan:
        try:
            V.check_device(plan.device)
        except ValueError as error:
            V.say(str(error))
        return lambda: None

    backbone = load(args, plan.recipe, plan.device, plan.dtype)
    try:
        backbone.encode(plan.prompts)
        backbone.load()
    except torch.OutOfMemoryError as error:
        raise stopped(error, "") from None
    if args.compile:
        backbone.pipe.transformer.compile()
    return lambda: run(args, plan, backbone, state)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a prompt's letters
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what cluster schedulers send is a Ctrl-C
    if args.list_scenarios:
        for name, story in P.SCENARIOS.items():
            V.say("\n    ".join([name, story.global_prompt, *(f"- {text}" for text in story.local_prompts)]))
        return
    try:
        rest = start(args)
    except ValueError as error:
        parser.exit(2, f"demo.py: {error}\n" if main_process() else None)
    except KeyboardInterrupt as error:
        raise stopped(error, "") from None
    rest()


if __name__ == "__main__":
    main()
