"""The notebooks run from top to bottom, at small size."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMERGE_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("DEMERGE_NOTEBOOK_IMAGES", "70")
    monkeypatch.setenv("DEMERGE_NOTEBOOK_BATCH", "4")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert notebook.cells[-1].outputs
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    figures = [data for data in shown if data.get("text/plain", "").startswith("<Figure")]
    assert figures and all("image/png" in data for data in figures)
