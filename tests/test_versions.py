"""Packages that are missing or too old are named before they are imported."""

import re
from importlib import metadata

import pytest
from helpers import ROOT

from extras import versions


def test_the_tested_versions_are_new_enough():
    versions.check_versions()
    pinned = dict(re.findall(r"^([\w-]+)\S*==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    least = versions.oldest()
    assert least.keys() <= pinned.keys() and set(versions.NEEDED) <= least.keys()
    assert all(versions.numbers(pinned[name]) >= versions.numbers(least[name]) for name in least)


@pytest.mark.parametrize("name, found, said", [
    ("diffusers", "0.39.0", "diffusers 0.39.0 is too old, 0.40.0 is needed"),
    ("transformers", "4.57.1", "transformers 4.57.1 is too old"),
    ("torch", "2.5.1+cu124", "torch 2.5.1+cu124 is too old, 2.6 is needed"),
    ("imageio", None, "imageio is missing"),
])  # fmt: skip
def test_what_is_too_old_is_named(name, found, said, monkeypatch):
    def version(package):
        if package == name and found is None:
            raise metadata.PackageNotFoundError
        return found if package == name else "99.0.dev1"

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(SystemExit, match=re.escape(said)):
        versions.check_versions()
