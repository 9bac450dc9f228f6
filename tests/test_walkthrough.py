"""The notebook runs from a clean kernel, and is committed with its outputs."""

import json
import statistics
from pathlib import Path

import pytest

reason = "the notebook needs extras/requirements.txt"
nbformat = pytest.importorskip("nbformat", reason=reason)
nbclient = pytest.importorskip("nbclient", reason=reason)
pytest.importorskip("ipykernel", reason=reason)
for package in ("matplotlib", "cv2", "scenedetect"):
    pytest.importorskip(package, reason=reason)

from extras.measure import reproduce as R  # noqa: E402
from extras.models.tiny import TINY  # noqa: E402

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


def test_the_last_figure_is_of_the_present_tables():
    """The means printed with it are those of the tables, for every row."""
    notebook = nbformat.read(PATH, 4)
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in code_cells(notebook)]
    [text] = [text for text in texts if text.startswith("mean difference")]
    done = dict(map(json.loads, (Path(R.__file__).parent / "tables.jsonl").read_text().splitlines()))
    videos = R.measure_rows(R.TinyModel(TINY.model, "float32"), range(*R.SEEDS["tables"]), R.TABLES, done, None)
    printed = {line[:30].strip(): list(map(float, line[30:].split())) for line in text.splitlines()[1:]}
    measures = ["identities", "local fidelity", "distance x 1000"]
    assert printed == {
        row: [float(f"{statistics.mean(R.differences(videos, row, m)):.2f}") for m in measures]
        for row in R.TABLES.keys() - {"SynCoS"}
    }


def test_runs_from_a_clean_kernel(monkeypatch):
    """In three steps: every cell works, no cell warns."""
    monkeypatch.setenv("STEPS", "3")
    notebook = nbformat.read(PATH, 4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
