"""Other people's machines, simulated by removing what they lack and adding what they have."""

import io
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import call, frames_of, needs_fork, refusal, settled

import backbones
from extras import devices, runs
from extras import options as O
from extras import videos as V
from extras.measure import bench
from extras.states import State

ROOT = Path(__file__).parents[1]


# --------------------------------------------------------------------------------------------------
# Windows and macOS

WITHOUT = """
import os, signal, socket, sys
import diffusers, transformers
diffusers.WanPipeline, transformers.T5EncoderModel  # libraries look for the system's name, not for what it has
for module, names in {os: ["fork", "pathconf", "killpg"], socket: ["TCP_KEEPIDLE", "TCP_KEEPINTVL"],
                      signal: ["SIGHUP", "SIGKILL", "SIGALRM", "alarm", "SIGUSR1", "SIGUSR2", "SIGXCPU"]}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.modules |= dict.fromkeys(["resource", "termios"])
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", *sys.argv[1:]]))
"""


def test_the_tests_run_without_what_windows_lacks():
    """All are collected; a run works; what needs more is skipped with a reason."""
    some = "test_a_run_writes_video_and_sheet or test_a_full_disk or test_who_waits"
    command = [sys.executable, "-c", WITHOUT, "-rs", "-k", some]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"1 passed, \d+ skipped", done.stdout), done.stdout
    skipped = re.findall(r"SKIPPED \[(\d)\] .*: (this system has .*)", done.stdout)  # more where packages are missing
    assert sorted(skipped) == [("1", "this system has no limits for a file"), ("2", "this system has no fork")]


def test_names_without_pathconf(tmp_path, monkeypatch):
    """Windows limits a name by letters, not by bytes."""
    monkeypatch.delattr(os, "pathconf")
    V.check_output(tmp_path / ("狐" * 80 + ".mp4"), (".mp4",))
    with pytest.raises(ValueError, match="256 letters"):
        V.check_output(tmp_path / ("狐" * 252 + ".mp4"), (".mp4",))


@pytest.mark.parametrize("name, wrong", {
    "NUL.mp4": "NUL", "con": "con", "lpt1.x.mp4": "lpt1", "aux .mp4": "aux", "a:b.mp4": ":", "a?.mp4": "?",
    "video.mp4.": ".", "a|b.mp4": "|", "console.mp4": "", "com.mp4": "", "nullable.mp4": "", "a b.mp4": "",
}.items())  # fmt: skip
def test_names_that_windows_keeps_to_itself(tmp_path, monkeypatch, name, wrong):
    found = V.refused_by_windows(name)
    assert found.strip("'") == wrong
    V.check_output(tmp_path / name, (Path(name).suffix,))  # other systems allow them
    monkeypatch.setattr(sys, "platform", "win32")
    if wrong:
        with pytest.raises(ValueError, match="Windows"):
            V.check_output(tmp_path / name, (Path(name).suffix,))


def test_a_mac_pools_on_the_cpu_and_frees_its_memory(base, monkeypatch):
    """MPS cannot pool 60 x 90 to 4 x 4; a tensor of another kind stands for it."""

    class OnMPS(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert "adaptive" not in function.__name__, "not implemented for MPS"
            result = super().__torch_function__(function, types, args, kwargs or {})
            return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result

    plan = O.plan_run(settled(*base))
    x0 = torch.randn(9, 4, 2, 4).as_subclass(OnMPS)
    [method] = plan.methods.values()
    monkeypatch.setattr(
        type(method), "sample", lambda self, b, p, latents, g, keep, *_: keep(0, 999, x0, latents) or latents
    )
    state = State(plan.about())
    runs.sample(plan, backbones.Backbone(""), state)
    assert state.trace["syncos"][0].shape == (9, 64) and type(state.trace["syncos"][0]) is torch.Tensor

    freed = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: freed.append(1))
    backbones.free_memory()
    assert freed


def test_without_proc_the_benchmark_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "PROC", tmp_path / "no")
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    assert math.isnan(bench.peak(lambda: None))
    monkeypatch.setattr(bench, "in_new_process", lambda f, *args: (math.nan, 1.0))
    assert all("not measured" in figure and "ms per latent frame" in figure for _, figure in bench.length())
    assert bench.mib(3.2) == "3 MiB"


# --------------------------------------------------------------------------------------------------
# Consoles, notebooks, threads


def cp1252():  # a console of Windows
    return io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")


@pytest.mark.parametrize("make", [cp1252, io.StringIO, lambda: None], ids=["cp1252", "notebook", "none"])
def test_any_console_or_none(base, tmp_path, monkeypatch, make):
    monkeypatch.setattr(sys, "stdout", out := make())
    monkeypatch.setattr(sys, "stderr", make())
    words = [*base[: base.index("--prompt")], "--prompt", "狐 runs \U0001f98a | it jumps"]
    call(*words, *(["--plan"] if out else []))
    if out is None:  # then progress bars have no console either
        assert len(frames_of(tmp_path / "video.mp4")) == 33
    with pytest.raises(SystemExit) as end:
        call(*words, "--scenario", "狐")
    assert end.value.code == 2
    if out:
        out.seek(0)
        assert "? runs" in out.read() if make is cp1252 else "狐 runs" in out.read()


def test_an_instruction_on_a_console_without_its_letters():
    """Nothing is lost: the escapes that are printed instead can be read by a language model."""
    old = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, ROOT / "prompts.py", "狐 runs"], env=old, capture_output=True, text=True)
    assert done.returncode == 0 and "Scenario: \\u72d0 runs" in done.stdout


def test_main_in_a_thread(base, monkeypatch):
    """No thread but the main one may ask for signals."""
    ends = []

    def work():
        try:
            call(*base)
        except BaseException as error:
            ends.append(error)

    def full(*_):
        raise OSError("The disk is full.")

    monkeypatch.setattr(V, "write_story", full)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(ends[0], SystemExit) and "The disk is full. The latents are safe; --decode" in ends[0].code


@needs_fork  # Windows cannot send it to a process alone
def test_ctrl_c_while_python_imports_is_a_word(tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / "demo.py"]
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    start = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731, a shell's background jobs ignore it
    run = subprocess.Popen(command, cwd=tmp_path, preexec_fn=start, **pipes)
    assert any("torch" in line for line in run.stderr)  # torch is being imported
    run.send_signal(signal.SIGINT)
    rest = [line for line in run.stderr if not line.startswith("import time:")]
    assert run.wait(60) == 1 and rest == ["Stopped.\n"]


@pytest.mark.parametrize("option", ["--prompt", "--model", "--output_path", "--state"])
def test_words_in_another_encoding_are_refused(base, tmp_path, capsys, option):
    word = str(tmp_path / os.fsdecode("M\xfcnchen.mp4".encode("latin-1")))
    assert f"{option} is not valid UTF-8" in refusal(capsys, *base, option, word)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# GPUs, drivers and builds of torch


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be another machine, with another build of torch."""

    def make(cuda=None, driver=False, error="Torch not compiled with CUDA enabled", gpus=0, capability=(8, 0)):
        def init():
            raise RuntimeError(error)

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(devices, "nvidia_driver", lambda: driver)
        for name, value in dict(
            init=init, is_available=lambda: bool(gpus), device_count=lambda: gpus or int(driver),
            get_arch_list=lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"],
            get_device_capability=lambda *_: capability, get_device_name=lambda *_: "Tesla X",
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return make


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to ..."
)


@pytest.mark.parametrize("has, said", [
    (dict(), "CUDA is not available on this machine; use --device cpu (slow for large models)."),
    (dict(driver=True), f"torch {torch.__version__} is a build for the CPU alone. Install one for CUDA (https://"),
    (dict(cuda="13.0", error="Found no NVIDIA driver on your system."), "CUDA is not available on this machine; use"),
    (dict(cuda="13.0", driver=True, error=TOO_OLD),
     f"torch {torch.__version__}, which is built for CUDA 13.0: The NVIDIA driver on your system is too old (found "
     "version 11040). Update the driver, install torch for an older CUDA (https://"),
    (dict(cuda="13.0", driver=True, error="No CUDA GPUs are available"), "13.0: No CUDA GPUs are available. Use"),
    (dict(cuda="13.0", gpus=1, capability=(7, 0)), "(CUDA 13.0) has no code for the Tesla X (compute capability 7.0)."),
])  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_told_before_a_download(machine, monkeypatch, capsys, has, said):
    machine(**has)
    online = lambda *_, **__: pytest.fail("asked the hub")  # noqa: E731
    monkeypatch.setattr("diffusers.CogVideoXTransformer3DModel.load_config", online)
    assert said in refusal(capsys, "--backbone", "cogvideox", "--model", "somebody/a-model", "--device", "cuda")
    call("--backbone", "cogvideox", "--plan", "--device", "cuda")
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0), (13, 1)])
def test_gpus_that_this_build_runs_on(machine, capability):
    machine(cuda="13.0", gpus=2, capability=capability)
    assert devices.missing_device("cuda") == devices.missing_device("cuda:1") == ""
    assert "2 GPUs" in devices.missing_device("cuda:2")


def test_bfloat16_where_it_is_emulated_or_missing(machine, monkeypatch, recwarn):
    machine(cuda="13.0", gpus=1, capability=(8, 0))
    devices.check_device("cuda", torch.bfloat16)
    machine(cuda="13.0", gpus=1, capability=(7, 5))
    devices.check_device("cuda", torch.float16)
    assert not recwarn
    devices.check_device("cuda", torch.bfloat16)
    assert "--dtype float16" in str(recwarn.pop(UserWarning).message)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)
    with pytest.raises(ValueError, match="macOS 14"):
        devices.check_device("mps", torch.bfloat16)


def test_nvidia_s_driver_is_found_by_its_files(monkeypatch, tmp_path):
    for name in ("nvidia-smi", "nvidia-smi.exe"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.nvidia_driver()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("SYSTEMROOT", str(tmp_path))
    if not Path("/proc/driver/nvidia/version").exists():
        assert not devices.nvidia_driver()
    (tmp_path / "System32").mkdir()
    (tmp_path / "System32" / "nvcuda.dll").touch()
    assert devices.nvidia_driver()


def test_compile_is_tried_before_anything_is_loaded(base, tmp_path, capsys, monkeypatch):
    def broken(function, **_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for ...")

    monkeypatch.setattr(torch, "compile", broken)
    assert "(InvalidCxxCompiler: No working C++ compiler found)" in refusal(capsys, *base, "--compile")
    assert not list(tmp_path.iterdir()) and not torch.compiler.config.force_disable_caches
