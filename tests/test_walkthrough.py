"""The notebook runs from a clean kernel, and is committed with its outputs."""

from pathlib import Path

import pytest

reason = "the notebook needs extras/requirements.txt"
nbformat = pytest.importorskip("nbformat", reason=reason)
nbclient = pytest.importorskip("nbclient", reason=reason)
pytest.importorskip("ipykernel", reason=reason)
pytest.importorskip("matplotlib", reason=reason)

PATH = Path(__file__).parents[1] / "walkthrough.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_committed_with_the_outputs_of_a_full_run():
    notebook = nbformat.read(PATH, 4)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    pictures = [output for output in outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert len(pictures) >= 9 and not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("of 25:" in output.get("text", "") for output in outputs)  # the steps of the full run
    assert not any(cell.metadata for cell in notebook.cells)  # no times of execution
    assert PATH.stat().st_size < 2e6


def test_runs_from_a_clean_kernel(monkeypatch):
    """In three steps: every cell works, no cell warns."""
    monkeypatch.setenv("STEPS", "3")
    notebook = nbformat.read(PATH, 4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
