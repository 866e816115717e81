"""What a command does not need is not imported before its first line of work."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROOMS = {  # what a command imports to make its plan, and what none of that may import
    "ranges": ("demerge.analysis.planning.ranges", "diffusers pandas seaborn sklearn"),
    "compare": (
        "demerge.evaluation.report.report, demerge.evaluation.results",
        "diffusers sklearn",
    ),
    "merge": ("demerge.merging.planning", "diffusers pandas seaborn matplotlib sklearn scipy"),
}
HEAVY = {
    room: (f"demerge.{module}", "diffusers.pipelines.pipeline_utils seaborn sklearn")
    for room, module in {
        "sample": "diffusion.drawing",
        "finetune": "finetuning.planning",
        "evaluate": "evaluation.planning",
        "analyze": "analysis.planning.analyze",
    }.items()
}


@pytest.mark.parametrize(
    "command",
    [*ROOMS, *(pytest.param(room, marks=pytest.mark.slow) for room in HEAVY)],
)
def test_a_command_imports_only_what_it_needs(command: str) -> None:
    modules, absent = (ROOMS | HEAVY)[command]
    code = f"import sys, demerge.cli.main, {modules}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not set(absent.split()) & set(result.stdout.split())
