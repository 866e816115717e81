"""What a command does not need is not imported before its first line of work, and some of it never."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demerge.conflict import ConflictMap, Origin
from demerge.timesteps import Partition

DRAWING = "matplotlib seaborn"
LATE = "diffusers.pipelines.pipeline_utils seaborn sklearn"
CHECK = """
import importlib, json, sys
for words, absent in json.loads(sys.argv[1]):
    if words[0] == "import":
        for name in ["demerge.cli.main", *words[1:]]:
            importlib.import_module(name)
    else:
        sys.argv = words
        try:
            sys.modules["demerge.cli.main"].main()
        except SystemExit as stopped:
            assert not stopped.code, words
    loaded = set(absent.split()) & set(sys.modules)
    assert not loaded, (words, loaded)
"""


@pytest.fixture
def conflict(tmp_path: Path) -> Path:
    """A stored map with the gradients of one layer."""
    gradients = np.random.default_rng(0).standard_normal((4, 8, 12)).astype(np.float32)
    gram = np.einsum("imd,jnd->imjn", gradients, gradients, dtype=np.float64)
    origin = Origin("model", "data", 12, "exact", "shared", False, "adam", 4, 0)
    bins, log_snr = Partition.uniform(1000, 4), np.linspace(9, -10, 1000)
    map = ConflictMap(bins, gram, log_snr, origin, {"a.weight": 12}, layers=gradients)
    return map.save(tmp_path / "conflict.safetensors")


def check(steps: list[tuple[list[str], str]]) -> None:
    """Take steps in a new process; each is followed by what may not have been imported so far."""
    subprocess.run([sys.executable, "-c", CHECK, json.dumps(steps)], check=True)


def test_a_command_imports_only_what_it_needs(tiny: Path, conflict: Path, tmp_path: Path) -> None:
    """In one process: most of its time goes into importing torch."""
    merge = ["demerge", "merge", str(tiny), str(tiny), "--method", "ties", "-o"]
    reports = ["demerge.evaluation.report.report", "demerge.evaluation.results"]
    check(
        [
            (["import", "demerge.merging.planning"], f"diffusers pandas sklearn scipy {DRAWING}"),
            ([*merge, str(tmp_path / "merged")], f"diffusers transformers pandas {DRAWING}"),
            (["import", "demerge.analysis.planning.ranges"], "diffusers pandas seaborn sklearn"),
            (["demerge", "ranges", str(conflict)], f"diffusers transformers {DRAWING}"),
            (
                ["demerge", "layers", str(conflict), "--share", "1"],
                f"diffusers transformers {DRAWING}",
            ),
            (["import", *reports], "diffusers sklearn"),
        ]
    )


@pytest.mark.slow
def test_a_command_that_needs_diffusers_imports_no_pipelines() -> None:
    modules = ("diffusion.drawing", "finetuning.planning", "evaluation.planning")
    names = [f"demerge.{module}" for module in (*modules, "analysis.planning.analyze")]
    check([(["import", name], LATE) for name in names])
