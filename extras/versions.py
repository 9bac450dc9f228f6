"""Names packages that are missing, or older than requirements-ranges.txt allows."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RANGES = Path(__file__).parents[1] / "requirements-ranges.txt"


def unfit(ranges: str) -> str:
    """What is missing or too old, and what to do, given lines like `torch>=2.6.0`; else empty.
    Ignores suffixes as in 2.6.0a0+nv25.1, and missing test packages."""
    numbers = lambda text: [*map(int, re.findall(r"\d+", text)), 0, 0][:3]  # noqa: E731
    missing, old = [], []
    for name, least in re.findall(r"(?m)^([\w-]+)\S*>=(\S+)", ranges):
        try:
            own = version(name)
        except PackageNotFoundError:
            missing += [] if name.startswith("pytest") else [name]
            continue
        if numbers(own) < numbers(least):
            old.append(f"{name} {own} (needed: {least} or newer)")
    found = [f"{what}: {', '.join(names)}. " for what, names in {"Missing": missing, "Too old": old}.items() if names]
    return f"{''.join(found)}Run: pip install -r {RANGES.name}" if found else ""


def check() -> None:
    """End the program, with status 2, if a package is missing or too old."""
    if message := unfit(RANGES.read_text() if RANGES.is_file() else ""):
        print(message, file=sys.stderr)
        sys.exit(2)
