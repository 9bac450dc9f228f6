"""Check a model on your machine, above all released weights that nobody has run before.

    python -m extras.measure.check --backbone cogvideox
    python -m extras.measure.check --backbone cogvideox --vae_tiling --offload model

Samples one window in a few steps, by the adapter and by diffusers' own pipeline, from the same
noise. Prints a report that can be pasted into an issue, and writes it beside a picture with the
middle frame of each (pipeline left, adapter right):

    difference    of the final latents, root mean square, relative to the pipeline's; and of the
                  frames that both decode from the pipeline's latents, mean, of 255
    seconds       of a guided evaluation of one window, median without the first; of decoding the
                  recipe's whole video
    memory        peak of torch's allocator in each phase, and what it reserved; the prediction is
                  of `extras.measure.memory`

diffusers has pipelines for CogVideoX and Wan. For other backbones the rest is measured. The text
encoder and the transformer are loaded one after the other, so a check fits where the demo does.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import diffusers as D
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from backbones import Backbone, CogVideoX, Recipe, check_finite, free_memory
from extras import options
from extras import videos as V
from extras.endings import reason
from extras.measure.memory import dry_run
from extras.models import RECIPES, get_recipe
from extras.models.wan import Wan
from prompts import SCENARIOS
from syncos import GEN_L_VIDEO, Settings, syncos

PIPELINES = {CogVideoX: D.CogVideoXPipeline, Wan: D.WanPipeline}
TOLERANCE = {torch.float32: 0.0001, torch.float16: 0.02, torch.bfloat16: 0.1}  # of the latents' relative difference
SAMPLING = "sampling, window batch 1"  # as `dry_run` has it


class Meter:
    """Seconds and peak memory of the work on a device."""

    def __init__(self, device: str):
        self.cuda, self.device = torch.device(device).type == "cuda", device

    def now(self) -> float:
        """Seconds, when all work is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak(self) -> tuple[float | None, float | None]:
        """GiB allocated and reserved at most since the last call; None unless on CUDA."""
        free_memory()
        if not self.cuda:
            return None, None
        peak = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return tuple(round(n / 2**30, 2) for n in peak)


def usual(times: list[float]) -> float:
    """Median without the first, which warms up."""
    return round(statistics.median(times[1:] or times), 4)


def sample_by_adapter(backbone: Backbone, prompt: str, noise: Tensor, steps: int, meter: Meter) -> tuple[Tensor, float]:
    """Final latents of one window, and seconds of a guided evaluation."""
    times = []

    def predict_x0(*args) -> Tensor:
        start = meter.now()
        x0 = backbone.predict_x0(*args)
        times.append(meter.now() - start)
        bar.update()
        return x0

    levels, window = backbone.levels(steps), slice(0, len(noise))
    settings, generator = Settings(**GEN_L_VIDEO), torch.Generator()
    with tqdm(total=steps, desc="adapter", unit="step") as bar:
        latents = syncos(predict_x0, noise.to(backbone.device), levels, [window], [prompt], settings, generator)
    check_finite("The adapter's last latent", latents)
    return latents.cpu(), usual(times)


@torch.no_grad()
def sample_by_pipeline(
    kind: Any, backbone: Backbone, prompt: str, noise: Tensor, steps: int, meter: Meter
) -> tuple[Tensor, np.ndarray, float]:
    """Final latents, frames (n H W 3, uint8) and seconds of a step of diffusers' own pipeline. It
    loads and encodes by itself; scheduler and noise are the adapter's."""
    wan, times, kept = kind is D.WanPipeline, [], []
    dtype = dict(default=backbone.dtype, vae=torch.float32) if wan else backbone.dtype
    load = lambda **left_out: kind.from_pretrained(backbone.model, dtype=dtype, **left_out)  # noqa: E731
    pipe = load(transformer=None, vae=None)
    backbone.place(pipe)
    length = dict(max_sequence_length=backbone.text_length)
    texts = dict(
        zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(prompt, backbone.negative_prompt, **length))
    )
    texts = {name: x.to(backbone.device) for name, x in texts.items()}
    del pipe
    free_memory()

    pipe = load(tokenizer=None, text_encoder=None)
    backbone.place(pipe)
    if backbone.tiling:
        pipe.vae.enable_tiling()
    if wan:
        pipe.scheduler = D.FlowMatchEulerDiscreteScheduler(shift=backbone.scheduler.get("flow_shift", 1.0))
    else:
        pipe.scheduler = D.CogVideoXDDIMScheduler.from_config(backbone.scheduler, timestep_spacing="trailing")
    pipe.set_progress_bar_config(desc=kind.__name__, unit="step")

    def after_step(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict:
        times.append(meter.now())
        if step == steps - 1:
            kept.append(tensors["latents"].float().cpu())
            if backbone.offload == "none":
                pipe.transformer.to("meta")  # leaves its memory to the decoder
                free_memory()
        return {}

    frames, _, height, width = noise.shape
    scale, size = pipe.vae_scale_factor_spatial, dict(num_frames=pipe.vae_scale_factor_temporal * (frames - 1) + 1)
    size |= dict(height=scale * height, width=scale * width, num_inference_steps=steps)
    noise = noise.transpose(0, 1)[None] if wan else noise[None].to(backbone.dtype)
    start, options = meter.now(), dict(guidance_scale=backbone.guidance_scale, callback_on_step_end=after_step)
    video = pipe(**texts, **size, **options, latents=noise.to(backbone.device), output_type="np").frames[0]
    latents = kept[0][0].transpose(0, 1) if wan else kept[0][0]
    check_finite("The pipeline's last latent", latents)
    each = [b - a for a, b in zip([start, *times], times)]
    return latents, (np.asarray(video) * 255).round().astype(np.uint8), usual(each)


def new_report(name: str, recipe: Recipe, device: str, dtype: torch.dtype, args: argparse.Namespace) -> dict:
    """What is known before anything is loaded."""
    pipelines = [kind.__name__ for base, kind in PIPELINES.items() if issubclass(recipe.backbone, base)]
    versions = dict(python=platform.python_version(), torch=torch.__version__, diffusers=D.__version__)
    versions |= dict(transformers=transformers.__version__)
    cuda = torch.device(device).type == "cuda"
    return dict(
        backbone=name, model=recipe.model, dtype=str(dtype).removeprefix("torch."), steps=args.steps,
        device=torch.cuda.get_device_name(device) if cuda else f"{device}, {platform.machine()}",
        versions=versions, offload=args.offload, vae_tiling=args.vae_tiling,
        pipeline=(pipelines or [None])[0], seconds={}, predicted=dict(recipe.seconds), memory={},
    )  # fmt: skip


def check(
    recipe: Recipe, device: str, dtype: torch.dtype, offload: str, tiling: bool, prompt: str, steps: int, report: dict
) -> np.ndarray:
    """Fill in the report, phase by phase; return the picture. Raises what a run can raise."""
    meter, memory, seconds = Meter(device), report["memory"], report["seconds"]
    backbone = recipe.make(device, dtype, offload=offload, tiling=tiling)
    noise = torch.randn(recipe.window, *recipe.latent, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    meter.peak()
    if kind := report["pipeline"]:
        kind = getattr(D, kind)
        theirs, frames, seconds["evaluation, pipeline"] = sample_by_pipeline(
            kind, backbone, prompt, noise, steps, meter
        )

    def measured(phase: str) -> None:
        memory[phase] = dict(zip(("allocated", "reserved"), meter.peak()))

    meter.peak()
    backbone.encode([prompt])
    measured("encode")
    backbone.load()
    ours, seconds["evaluation, adapter"] = sample_by_adapter(backbone, prompt, noise, steps, meter)
    measured(SAMPLING)
    backbone.release_transformer()
    meter.peak()
    pictures = [list(backbone.decode(ours))[recipe.frames_per_latent * (len(noise) // 2)]]
    if kind:
        decoded = np.stack(list(backbone.decode(theirs)))
        report["latents, relative difference"] = ((ours - theirs).norm() / theirs.norm()).item()
        report["frames, mean difference"] = np.abs(decoded.astype(float) - frames).mean().item()
        pictures.insert(0, frames[recipe.frames_per_latent * (len(noise) // 2)])
    video = ours.repeat(-(-recipe.latent_frames // len(ours)), 1, 1, 1)[: recipe.latent_frames]
    start = meter.now()
    count = sum(1 for _ in backbone.decode(video))
    seconds[f"decoding {count} frames"] = round(meter.now() - start, 2)
    measured("decode")
    del backbone
    free_memory()
    if offload == "none":
        on_meta = recipe.make("meta", dtype, tiling=tiling)
        for phase, gib in dry_run(on_meta, recipe, [1], recipe.latent_frames):
            memory[phase]["predicted"] = round(gib, 2)
    return np.concatenate(pictures, axis=1)


def judge(report: dict, tolerance: float) -> str:
    """The verdict on a report that is complete."""
    if not report["pipeline"]:
        return "NOT COMPARED: diffusers has no pipeline of this model; times and memory were measured."
    latents, frames = report["latents, relative difference"], report["frames, mean difference"]
    return (
        f"{'PASS' if latents <= tolerance and frames <= 1 else 'FAIL'}: the adapter's latents differ from "
        f"{report['pipeline']}'s by {latents:.2g} (tolerance {tolerance:g} for {report['dtype']}), frames decoded from "
        f"the same latents by {frames:.2g} of 255 (tolerance 1)."
    )


def describe(report: dict) -> str:
    """The report as text."""
    known = ", ".join(f"{seconds} s on {gpu}" for gpu, seconds in report["predicted"].items()) or "not known"
    columns = ("allocated", "reserved", "predicted")
    line = lambda name, cells: f"{name:26}" + "".join(f"{'-' if x is None else x:>11}" for x in cells)  # noqa: E731
    return "\n".join([
        f"{report['backbone']}: {report['model']}, {report['dtype']}, {report['steps']} steps of one window, "
        f"offload {report['offload']}, tiling {'on' if report['vae_tiling'] else 'off'}",
        f"{report['device']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        *(f"{name}: {value} s" for name, value in report["seconds"].items()),
        f"evaluation, predicted from public figures: {known}",
        line("peak memory, GiB", columns),
        *(line(f"  {phase}", [row.get(key) for key in columns]) for phase, row in report["memory"].items()),
        report["verdict"],
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="cogvideox", help=", ".join(RECIPES) + " (default: cogvideox)")
    parser.add_argument("--model", help="hub id or folder (default: the released one)")
    parser.add_argument("--prompt", help="(default: the first event of the backbone's scenario)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default: 10)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best available)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: the backbone's)")
    parser.add_argument("--offload", choices=["none", "model", "sequential"], default="none", help="as demo.py")
    parser.add_argument("--vae_tiling", action="store_true", help="as demo.py")
    parser.add_argument("--output_path", type=Path, default=Path("output.check.png"), help="the picture; the report is "
        "beside it, as .txt and .json (default: output.check.png)")  # fmt: skip
    parser.set_defaults(compile=False, plan=False)
    args = parser.parse_args(argv)
    files = {suffix: args.output_path.with_suffix(suffix) for suffix in (".png", ".txt", ".json")}
    try:
        for path in files.values():
            V.check_output(path, (path.suffix,))
        if args.steps < 1 or 1000 % args.steps:  # else diffusers' DDIM takes a previous timestep that is not the list's
            raise ValueError(f"--steps must divide 1000, like 4, 5, 8 and 10, got {args.steps}.")
        recipe = get_recipe(args.backbone, args.model)
        device, dtype = options.choose_device(args, recipe)
        prompt = args.prompt or SCENARIOS[recipe.scenario].event_prompts()[0]
        report = new_report(args.backbone, recipe, device, dtype, args)
        try:
            picture = check(recipe, device, dtype, args.offload, args.vae_tiling, prompt, args.steps, report)
            report["verdict"] = judge(report, TOLERANCE[dtype])
            with V.replacing(files[".png"]) as partial:
                Image.fromarray(picture).save(partial)
        except (Exception, KeyboardInterrupt) as error:
            if not (why := reason(error)):
                raise
            report["verdict"] = why
    except ValueError as error:
        parser.exit(2, f"check.py: {error}\n")
    files[".txt"].write_text(describe(report) + "\n", encoding="utf-8")
    files[".json"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    V.say(f"{describe(report)}\nWrote {', '.join(str(path) for path in files.values() if path.exists())}")
    sys.exit(0 if report["verdict"].startswith(("PASS", "NOT COMPARED")) else 1)


if __name__ == "__main__":
    main()
