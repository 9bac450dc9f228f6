"""Names installed packages that are older than requirements-ranges.txt allows."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RANGES = Path(__file__).parents[1] / "requirements-ranges.txt"


def too_old(ranges: str) -> str:
    """What to update, as one sentence, given lines like `torch>=2.6.0`; empty if nothing. Ignores
    what is missing, which fails in its own words, and suffixes as in 2.6.0a0+nv25.1."""
    numbers = lambda text: [*map(int, re.findall(r"\d+", text)), 0, 0][:3]  # noqa: E731
    old = []
    for name, least in re.findall(r"(?m)^([\w-]+)\S*>=(\S+)", ranges):
        try:
            own = version(name)
        except PackageNotFoundError:
            continue
        if numbers(own) < numbers(least):
            old.append(f"{name} {own} (needed: {least} or newer)")
    return f"Too old: {', '.join(old)}. Update with: pip install -r {RANGES.name}" if old else ""


def check() -> None:
    """End the program, with status 2, if a package is too old."""
    if message := too_old(RANGES.read_text() if RANGES.is_file() else ""):
        print(message, file=sys.stderr)
        sys.exit(2)
