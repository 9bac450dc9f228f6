"""Packages that are too old are named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extras.versions import RANGES, too_old

ROOT = Path(__file__).parents[1]


def test_this_environment_is_in_the_ranges():
    assert not too_old(RANGES.read_text())
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
    assert bool(too_old(f"# words\nthing[more]>={least}\n")) == old
    assert not too_old("")


@pytest.mark.parametrize("words", [["demo.py"], ["-m", "extras.llm", "A cat", "--llm", "m"]])
def test_a_program_names_it_and_stops(words, tmp_path):
    (tmp_path / "diffusers-0.35.2.dist-info").mkdir()
    (tmp_path / "diffusers-0.35.2.dist-info" / "METADATA").write_text("Name: diffusers\nVersion: 0.35.2\n")
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    run = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    wanted = "Too old: diffusers 0.35.2 (needed: 0.40.0 or newer). Update with: pip install -r requirements-ranges.txt"
    assert run.returncode == 2 and run.stderr.strip() == wanted
