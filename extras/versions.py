"""Are the packages there, and new enough? Asked before any of them is imported."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = Path(__file__).parent / "requirements-any.txt"
NEEDED = ("torch", "diffusers", "transformers", "accelerate", "imageio")


def oldest() -> dict[str, str]:
    """The oldest version of each package that will do."""
    return {"torch": "2.6"} | dict(re.findall(r"^([\w-]+)\S*>=(\S+)", FILE.read_text(), re.MULTILINE))


def numbers(text: str) -> list[int]:
    """2.6.0+cu124 -> [2, 6, 0]."""
    return [int(n) for n in re.match(r"[\d.]*\d|", text)[0].split(".") if n]


def check_versions() -> None:
    """End the program with a sentence if a package is missing or too old."""
    least = oldest()
    for name in NEEDED:
        try:
            found = version(name)
        except PackageNotFoundError:
            raise SystemExit(f"The package {name} is missing; run: pip install -r requirements.txt") from None
        if numbers(found) < numbers(least[name]):
            raise SystemExit(
                f"{name} {found} is too old, {least[name]} is needed; run: pip install -U '{name}>={least[name]}'"
            )
