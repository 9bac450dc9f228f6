"""Benchmark, all rows in one run on one machine: read the ratios, not the seconds.

    python -m extras.measure.bench                         every row that this machine can measure:
                                                           minutes
    python -m extras.measure.bench --only overhead length  some of: model overhead length methods
                                                           processes memory

"2B" is a transformer of CogVideoX-2B's size with random weights. Memory is a row's peak above what
is in use when it starts, counted by torch's allocator (GPU) or by the Linux kernel (CPU process).
The part "memory" is a prediction, the same on every machine: see memory.py.
"""

import argparse
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

import syncos as S
from backbones import COGVIDEOX_2B, Backbone, Recipe
from extras.baselines import Plan
from extras.measure import memory
from extras.methods import METHODS
from extras.models.tiny import TINY

PROC = Path("/proc/self")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIG = COGVIDEOX_2B
LEVEL = S.Level(899, 0.15, 0.99)


def seconds(f: Callable[[], object], runs: int = 5) -> float:
    """Median time of f after a warm-up."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        f()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak(f: Callable[[], object]) -> float:
    """Peak memory of f in MiB, above what is in use when it starts; NaN if nothing counts it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = lambda key: int((PROC / "status").read_text().split(key + ":")[1].split()[0]) / 1024  # noqa: E731
    try:
        (PROC / "clear_refs").write_text("5")  # reset the peak
        before = status("VmRSS")
    except OSError:  # macOS and Windows have no such files, some containers lock them
        f()
        return math.nan
    f()
    return status("VmHWM") - before


def mib(memory: float) -> str:
    return "memory not measured (needs Linux's /proc)" if math.isnan(memory) else f"{memory:.0f} MiB"


def in_new_process(f: Callable, *args):
    """f(*args) in a new process, without memory left over from before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def evaluations(recipe: Recipe, name: str) -> int:
    plan, method = Plan(recipe, ("",)), METHODS[name](recipe.settings)
    return method.evaluations(plan, method.steps(plan))


# --------------------------------------------------------------------------------------------------
# The model: cost of evaluating a window at CogVideoX-2B's size


def make_2b(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    with torch.device(DEVICE):
        transformer = CogVideoXTransformer3DModel(num_layers=layers)  # all its other defaults are the 2B's
    return transformer.to(dtype).eval().requires_grad_(False)


def evaluation(transformer: torch.nn.Module, windows: int, calls: int = 1) -> Callable[[], None]:
    """Guided evaluation of some windows, with both halves of the guidance in one call of the
    transformer or in two."""
    n = 2 * windows // calls
    x, text, t = torch.randn(n, BIG.window, *BIG.latent), torch.randn(n, 226, 4096), torch.full((n,), 500)
    x, text, t = x.to(DEVICE, transformer.dtype), text.to(DEVICE, transformer.dtype), t.to(DEVICE)

    def run():
        for _ in range(calls):
            transformer(x, text, t, return_dict=False)

    return run


@functools.cache
def evaluation_seconds() -> float:
    """Seconds per guided window; on a CPU, 30 times one layer in float32."""
    if DEVICE == "cpu":
        run, start = evaluation(make_2b(1, torch.float32), 1), time.perf_counter()
        run()  # a minute; once is enough
        return 30 * (time.perf_counter() - start)
    return seconds(evaluation(make_2b(30, torch.float16), 1))


def model() -> Iterator[tuple[str, str]]:
    base = evaluation_seconds()
    if DEVICE == "cpu":
        yield "2B, one guided window: 30 times one layer, float32", f"{base:.0f} s"
    else:
        yield from whole_model(base)


def whole_model(base: float) -> Iterator[tuple[str, str]]:
    """Rows for a GPU. base: seconds per guided window in float16."""
    for dtype in (torch.bfloat16, torch.float16):
        transformer, gib = make_2b(30, dtype), lambda f: f"{peak(f) / 1024:.1f} GiB besides the weights"
        for windows, calls in ((1, 1), (1, 2), (2, 1), (4, 1)):
            f = evaluation(transformer, windows, calls)
            name = f"2B, {dtype}, {windows} window{'s' * (windows > 1)}, guidance in {calls} call{'s' * (calls > 1)}"
            yield name, f"{seconds(f) / windows:.3f} s per window, {gib(f)}"
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    pipe = CogVideoXPipeline(None, None, None, transformer, CogVideoXDDIMScheduler.from_config(BIG.scheduler))
    text = torch.randn(1, 226, 4096, device=DEVICE, dtype=transformer.dtype)
    call = dict(num_frames=49, prompt_embeds=text, negative_prompt_embeds=text, output_type="latent")
    clip = seconds(lambda: pipe(**call, num_inference_steps=BIG.num_inference_steps), runs=1)
    yield "2B, CogVideoXPipeline, one clip of 49 frames, not decoded", f"{clip / 60:.2f} min"
    minutes = {method: evaluations(BIG, method) * base / 60 for method in ("gen-l-video", "syncos")}
    for method, m in minutes.items():
        yield f"2B, {method}, 193 frames, predicted from the evaluations", f"{m:.1f} min, {60 * m / clip:.1f} clips"
    yield "SynCoS / Gen-L-Video (the paper's 55 and 21 min: 2.6)", f"{minutes['syncos'] / minutes['gen-l-video']:.2f}"
    transformer.compile()
    yield "2B, torch.compile", f"{base / seconds(evaluation(transformer, 1)):.2f} times as fast"


# --------------------------------------------------------------------------------------------------
# The sampler, with a model that costs nothing


def still(latents: Tensor, t: float, prompts: list[str]) -> Tensor:
    return latents


def overhead() -> Iterator[tuple[str, str]]:
    windows, s = BIG.windows(), BIG.settings
    x, noise = torch.randn(2, windows[-1].stop, *BIG.latent).to(DEVICE)
    prompts, generator = [""] * len(windows), torch.Generator().manual_seed(0)
    stages = {
        "stage 1, 10 evaluations": lambda: S.temporal_codenoise(still, x, LEVEL.t, windows, prompts),
        f"stage 2, {s.csd_iters * s.csd_batch} evaluations": lambda: S.csd_refine(
            still, x, [LEVEL], noise, windows, prompts, generator, s.csd_iters, s.csd_batch
        ),
        "stage 3, its noise included": lambda: S.revert(x, torch.randn(x.shape, generator=generator).to(DEVICE), LEVEL),
    }
    step = (len(windows) + s.csd_iters * s.csd_batch) * evaluation_seconds()
    times = {name: seconds(f) for name, f in stages.items()}
    for name, t in [*times.items(), ("a step of all three", sum(times.values()))]:
        yield f"outside the model, {name}", f"{1000 * t:.0f} ms, {t / step:.4%} of a step with the 2B"


def cost_of_sampling(frames: int) -> tuple[float, float]:
    """MiB and seconds of a step of all three stages, five iterations."""
    windows = S.make_windows(frames, BIG.window, BIG.stride)
    x, settings = torch.randn(frames, *BIG.latent).to(DEVICE), replace(BIG.settings, csd_iters=5)
    args = ([LEVEL, S.Level(-1, 1, 0)], windows, [""] * len(windows), settings, torch.Generator().manual_seed(0))
    run = lambda: S.syncos(still, x, *args)  # noqa: E731
    return peak(run), seconds(run, 1)


def cost_of_decoding(frames: int) -> tuple[float, float]:
    backbone = TINY.make(DEVICE)
    backbone.load(decoder_only=True)
    run = lambda frames: [None for _ in backbone.decode(torch.randn(frames, *TINY.latent))]  # noqa: E731
    start = time.perf_counter()
    memory = peak(lambda: run(frames))
    return memory, time.perf_counter() - start


def length() -> Iterator[tuple[str, str]]:
    """Costs at multiples of the base clip."""
    for what, cost, recipe in (("sampling", cost_of_sampling, BIG), ("decoding", cost_of_decoding, TINY)):
        for times in (1, 4, 16):
            frames = times * (recipe.window - 1) + 1
            memory, t = in_new_process(cost, frames)
            latent = frames * torch.Size(recipe.latent).numel() * 4 / 2**20
            yield (
                f"{what}, {times}x: {frames} latent frames, {latent:.1f} MiB",
                f"{mib(memory)} at the peak, {1000 * t / frames:.1f} ms per latent frame",
            )


# --------------------------------------------------------------------------------------------------
# Whole runs of the tiny model


def make_tiny() -> tuple[Plan, Backbone]:
    plan, backbone = Plan(TINY, ("A star. It jumps.",)), TINY.make(DEVICE)
    backbone.encode(plan.texts)
    backbone.load()
    backbone.set_levels(plan.levels)
    return plan, backbone


def sampling_seconds(plan: Plan, backbone: Backbone, name: str, batch: int = TINY.window_batch) -> float:
    plan = replace(plan, recipe=replace(plan.recipe, window_batch=batch))
    x = torch.randn(plan.recipe.latent_frames, *plan.recipe.latent).to(DEVICE)
    method = METHODS[name](plan.recipe.settings)
    return seconds(lambda: method.sample(backbone, plan, x, torch.Generator()), 1)


def methods() -> Iterator[tuple[str, str]]:
    plan, backbone = make_tiny()
    base = None
    for name in ("gen-l-video", "syncos"):
        t, n = sampling_seconds(plan, backbone, name), evaluations(TINY, name)
        base = base or (t, n)
        yield f"tiny, {name}, 193 frames", f"{t:.1f} s ({t / base[0]:.2f}x), {n} evaluations ({n / base[1]:.2f}x)"


def worker(rank: int, world: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    t = sampling_seconds(*make_tiny(), "syncos", batch=1)
    if rank == 0:
        Path(meeting + ".seconds").write_text(str(t))
    dist.destroy_process_group()


def processes() -> Iterator[tuple[str, str]]:
    """Compare two processes with one, on the CPU, one thread each."""
    times = []
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(worker, (world, f"{folder}/meeting"), nprocs=world)
            times.append(float(Path(f"{folder}/meeting.seconds").read_text()))
        yield f"tiny, syncos, on the CPU, {world} process{'es' * (world > 1)} of one thread", f"{times[-1]:.1f} s"
    yield "  two processes compared with one", f"{times[0] / times[1]:.2f} times as fast"


PARTS = {f.__name__: f for f in (model, overhead, length, methods, processes)} | {"memory": memory.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [part for part in PARTS if part != "memory"]
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=every, metavar="PART", help="(default: all but memory)"
    )
    args = parser.parse_args()
    where = f"CPU, {torch.get_num_threads()} threads"
    if DEVICE == "cuda":
        where = f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    print(f"torch {torch.__version__}, {where}")
    for part in args.only:
        for what, figure in PARTS[part]():
            print(f"{what:70}{figure}", flush=True)


if __name__ == "__main__":
    main()
