"""Measure the program: one table, every row from one run on one machine, so read the ratios and not the seconds.

    python measure/bench.py                         every row that this machine can show: minutes
    python measure/bench.py --only gradient length  some of: model overhead gradient length methods processes memory

"2B" is a transformer of CogVideoX-2B's size with random weights. Memory is what a piece needs at its peak above what is
there when it starts: of a GPU by torch's allocator, of a CPU process by the kernel's count (Linux). The part
"memory" is a prediction, the same on every machine: see memory.py.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))

import memory  # noqa: E402
import syncos as S  # noqa: E402
from backbones import RECIPES, Recipe, get_recipe, in_batches  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIG, TINY = RECIPES["cogvideox"], RECIPES["tiny"]
LEVEL = S.Level(899, 0.15, 0.99)


def seconds(f: Callable[[], object], runs: int = 5) -> float:
    """Median time of f, once warm."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        f()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak(f: Callable[[], object]) -> float:
    """MiB that f needs at its peak above what is there when it starts."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    f()
    return status("VmHWM") - before


def in_new_process(f: Callable, *args):
    """f(*args), where no memory that was freed before lies about."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def evaluations(recipe: Recipe, method: str) -> int:
    levels = recipe.backbone.make_levels(recipe.scheduler, recipe.num_inference_steps)
    return S.count_evaluations(levels, recipe.windows(), replace(recipe.settings, **S.METHODS[method]))


# ----------------------------------------------------------------------------------------------------------------------
# The model: what a window evaluation costs at CogVideoX-2B's size


def make_2b(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    with torch.device(DEVICE):
        transformer = CogVideoXTransformer3DModel(num_layers=layers)  # all its other defaults are the 2B's
    return transformer.to(dtype).eval().requires_grad_(False)


def evaluation(transformer: torch.nn.Module, windows: int, calls: int = 1) -> Callable[[], None]:
    """A guided evaluation of some windows, the two halves of the guidance in one call of the transformer or in two."""
    n = 2 * windows // calls
    x, text, t = torch.randn(n, BIG.window, *BIG.latent), torch.randn(n, 226, 4096), torch.full((n,), 500)
    x, text, t = x.to(DEVICE, transformer.dtype), text.to(DEVICE, transformer.dtype), t.to(DEVICE)

    def run():
        for _ in range(calls):
            transformer(x, text, t, return_dict=False)

    return run


@functools.cache
def evaluation_seconds() -> float:
    """One guided window: on a CPU one layer, float32, times 30."""
    if DEVICE == "cpu":
        return 30 * seconds(evaluation(make_2b(1, torch.float32), 1), runs=1)
    return seconds(evaluation(make_2b(30, torch.float16), 1))


def model() -> Iterator[tuple[str, str]]:
    base = evaluation_seconds()
    if DEVICE == "cpu":
        yield "2B, a guided window: 30 times one layer, float32", f"{base:.0f} s"
    else:
        yield from whole_model(base)


def whole_model(base: float) -> Iterator[tuple[str, str]]:
    """For a GPU; base: seconds of a guided window in float16."""
    for dtype in (torch.bfloat16, torch.float16):
        transformer, gib = make_2b(30, dtype), lambda f: f"{peak(f) / 1024:.1f} GiB beside the weights"
        for windows, calls in ((1, 1), (1, 2), (2, 1), (4, 1)):
            f = evaluation(transformer, windows, calls)
            name = f"2B, {dtype}, {windows} window{'s' * (windows > 1)}, guidance in {calls} call{'s' * (calls > 1)}"
            yield name, f"{seconds(f) / windows:.3f} s a window, {gib(f)}"
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


# ----------------------------------------------------------------------------------------------------------------------
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


def naive_gradient(x0: Tensor, noisy: Tensor, predicted: Tensor, level: S.Level) -> Tensor:
    """`csd_gradient` by the tensor of all differences, B x B x D."""
    B = len(x0)
    x = noisy.flatten(1)
    difference = x[:, None] - x[None]
    d2 = difference.square().sum(-1)
    h = d2[~torch.eye(B, dtype=torch.bool, device=x.device)].median() / torch.tensor(B + 1.0).log()
    K = torch.exp(-d2 / h)
    repulsion = (-2 / h * K[:, :, None] * difference).sum(0)
    residual = level.alpha / level.sigma * (x0 - predicted).flatten(1)
    return (level.sigma**2 / B * (K @ residual - repulsion)).view_as(x0)


def cost_of_gradient(f: Callable, B: int) -> tuple[float, float]:
    x0, noisy, predicted = torch.randn(3, B, BIG.window, *BIG.latent).to(DEVICE)
    run = lambda: f(x0, noisy, predicted, LEVEL)  # noqa: E731
    return peak(run), seconds(run)


def gradient() -> Iterator[tuple[str, str]]:
    for B in (4, 8):
        (ours, fast), (theirs, slow) = (
            in_new_process(cost_of_gradient, f, B) for f in (S.csd_gradient, naive_gradient)
        )
        yield f"csd_gradient, B = {B}", f"{1000 * fast:.0f} ms, {ours:.0f} MiB"
        yield "  by the B x B x D tensor", f"{slow / fast:.1f} times as long, {theirs / ours:.1f} times the memory"


def cost_of_sampling(frames: int) -> tuple[float, float]:
    """A step of all three stages, five iterations."""
    windows = S.make_windows(frames, BIG.window, BIG.settings.stride)
    x, settings = torch.randn(frames, *BIG.latent).to(DEVICE), replace(BIG.settings, csd_iters=5)
    args = ([LEVEL, S.Level(-1, 1, 0)], windows, [""] * len(windows), settings, torch.Generator().manual_seed(0))
    run = lambda: S.syncos(still, x, *args)  # noqa: E731
    return peak(run), seconds(run, 1)


def cost_of_decoding(frames: int) -> tuple[float, float]:
    recipe = get_recipe("tiny")
    backbone = recipe.backbone(recipe.model, DEVICE)
    backbone.load(decoder_only=True)
    run = lambda frames: [None for _ in backbone.decode(torch.randn(frames, *recipe.latent))]  # noqa: E731
    start = time.perf_counter()
    memory = peak(lambda: run(frames))
    return memory, time.perf_counter() - start


def length() -> Iterator[tuple[str, str]]:
    """In multiples of the base clip."""
    for what, cost, recipe in (("sampling", cost_of_sampling, BIG), ("decoding", cost_of_decoding, TINY)):
        for times in (1, 4, 16, 64):
            frames = times * (recipe.window - 1) + 1
            memory, t = in_new_process(cost, frames)
            latent = frames * torch.Size(recipe.latent).numel() * 4 / 2**20
            yield (
                f"{what}, {times}x: {frames} latent frames, {latent:.1f} MiB",
                f"{memory:.0f} MiB at the peak, {1000 * t / frames:.1f} ms a latent frame",
            )


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs of the tiny model


def make_tiny() -> tuple:
    recipe = get_recipe("tiny")
    backbone = recipe.backbone(recipe.model, DEVICE, guidance_scale=recipe.guidance_scale)
    prompts = ["A star. It jumps."] * len(recipe.windows())
    backbone.encode(prompts)
    backbone.load()
    return recipe, backbone, prompts


def sampling_seconds(recipe: Recipe, backbone, prompts: list[str], method: str, predict_x0: Callable) -> float:
    windows, levels = recipe.windows(), backbone.levels(recipe.num_inference_steps)
    settings = replace(recipe.settings, **S.METHODS[method])
    x = torch.randn(windows[-1].stop, *recipe.latent).to(DEVICE)
    run = lambda: S.syncos(predict_x0, x, levels, windows, prompts, settings, torch.Generator())  # noqa: E731
    return seconds(run, 1)


def methods() -> Iterator[tuple[str, str]]:
    recipe, backbone, prompts = make_tiny()
    base = None
    for method in ("gen-l-video", "syncos"):
        t, n = sampling_seconds(recipe, backbone, prompts, method, backbone.predict_x0), evaluations(recipe, method)
        base = base or (t, n)
        yield (
            f"tiny, {method}, 193 frames",
            f"{t:.1f} s ({t / base[0]:.2f}x), {n} evaluations ({n / base[1]:.2f}x)",
        )


def worker(rank: int, world: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    recipe, backbone, prompts = make_tiny()
    t = sampling_seconds(recipe, backbone, prompts, "syncos", in_batches(backbone.predict_x0, 1))
    if rank == 0:
        Path(meeting + ".seconds").write_text(str(t))
    dist.destroy_process_group()


def processes() -> Iterator[tuple[str, str]]:
    """On the CPU, one thread a process."""
    times = []
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(worker, (world, f"{folder}/meeting"), nprocs=world)
            times.append(float(Path(f"{folder}/meeting.seconds").read_text()))
        yield f"tiny, syncos, {world} process{'es' * (world > 1)} of one thread", f"{times[-1]:.1f} s"
    yield "  two processes against one", f"{times[0] / times[1]:.2f} times as fast"


PARTS = {f.__name__: f for f in (model, overhead, gradient, length, methods, processes)} | {"memory": memory.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    for part in args.only:
        for what, figure in PARTS[part]():
            print(f"{what:70}{figure}", flush=True)


if __name__ == "__main__":
    main()
