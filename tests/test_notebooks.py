"""The notebooks run from top to bottom, at small size, and are committed with their outputs.

The cells run in this process: a kernel of their own would import torch once more for each notebook.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SLOW = {"emoji"}  # it makes a toy run first; test_examples.py has tests of its parts
each_run = pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
SMALL = {"STEPS": "1", "IMAGES": "66", "BATCH": "1", "SEEDS": "1", "BINS": "4"}
SMALLER = {  # no settings of their readers
    "steps=12,": "steps=2,",
    "samples=32)": "samples=4)",
    '"average", "ties", "dare", "slerp", "fisher", "regmean"': '"ties", "fisher"',
}
LARGEST = 1_000_000  # bytes


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


class Shell(InteractiveShell):
    """A shell without windows."""

    def enable_gui(self, gui: object = None) -> None:
        """Do nothing."""


@each_run
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(f"DEMERGE_NOTEBOOK_{name}", value)
    shell, shown = Shell(), []
    select_figure_formats(shell, {"png"})
    for cell in read(path).cells:
        if cell.cell_type == "code":
            source = cell.source
            for text, small in SMALLER.items():
                source = source.replace(text, small)
            result = shell.run_cell(source)
            result.raise_error()
            shown.append(shell.display_formatter.format(result.result)[0])
    plt.switch_backend("agg")
    figures = [data for data in shown if data.get("text/plain", "").startswith("<Figure")]
    assert figures and all("image/png" in data for data in figures)


@each_notebook
def test_notebook_has_its_outputs(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output for output in outputs if output.output_type == "error"] == []
