"""Packages that are missing or too old are named."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from extras.versions import RANGES, unfit

ROOT = Path(__file__).parents[1]


def test_this_environment_is_in_the_ranges():
    assert not unfit(RANGES.read_text())
    pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    ranges = dict(line.split(">=") for line in RANGES.read_text().splitlines() if ">=" in line)
    assert pinned.keys() == ranges.keys()


@pytest.mark.parametrize("own, least, old", [
    ("2.13.0+cpu", "2.6.0", False),
    ("2.6", "2.6.0", False),
    ("2.6.0a0+ecf3bae40a.nv25.01", "2.6.0", False),
    ("2.5.1+cu124", "2.6.0", True),
    ("0.9.9", "0.40.0", True),
])  # fmt: skip
def test_comparison(own, least, old, monkeypatch):
    monkeypatch.setattr("extras.versions.version", lambda name: own)
    assert bool(unfit(f"# words\nthing[more]>={least}\n")) == old
    assert not unfit("")


@pytest.mark.parametrize("words", [["demo.py"], ["-m", "extras.llm", "A cat", "--llm", "m"]])
def test_a_program_names_it_and_stops(words, tmp_path):
    (tmp_path / "diffusers-0.35.2.dist-info").mkdir()
    (tmp_path / "diffusers-0.35.2.dist-info" / "METADATA").write_text("Name: diffusers\nVersion: 0.35.2\n")
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    run = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    wanted = "Too old: diffusers 0.35.2 (needed: 0.40.0 or newer). Run: pip install -r requirements-ranges.txt"
    assert run.returncode == 2 and run.stderr.strip() == wanted


def test_without_any_package_the_demo_names_them(tmp_path):
    """In a Python that sees none of them: one sentence, and --help as ever."""
    run = lambda *words: subprocess.run(  # noqa: E731
        [sys.executable, "-I", "-S", "-c", f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
         f"sys.argv[0] = 'demo.py'; runpy.run_path({str(ROOT / 'demo.py')!r}, run_name='__main__')", *words],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run("--help").returncode == 0
    assert run().returncode == 2 and re.fullmatch(
        r"Missing: torch, diffusers, .*requests\. Run: pip install -r requirements-ranges\.txt\n", run().stderr
    )
