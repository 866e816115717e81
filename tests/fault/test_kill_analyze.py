"""SIGKILL at any moment of an analysis: finished groups stay, the same command goes on, and the map has the same bytes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from demerge.analysis.stages.analyze import Plan, prepare
from demerge.storage.atomic import sha256


def plan(tiny: Path, out: Path) -> Plan:
    settings: dict[str, Any] = {
        "bins": 4,
        "groups": 5,
        "batch_size": 2,
        "ranges": 2,
        "engine": "sketch",
        "metric": "adam",
    }
    return prepare(str(tiny), "digits", out, **settings)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_analysis_goes_on(tiny: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    plan(tiny, tmp_path / "whole").map()
    whole = sha256(tmp_path / "whole" / "conflict.safetensors")
    out, kept = tmp_path / "out", []
    folder = out / "conflict.partial"
    for enough in (1, 3):
        child = os.fork()
        if child == 0:
            try:
                plan(tiny, out).map()
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*.safetensors"))) < enough and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        kept.append(len(list(folder.glob("*.safetensors"))))
    assert 1 <= kept[0] <= kept[1] < 6
    seen: list[int] = []
    plan(tiny, out).map(lambda done, total, text: seen.append(done))
    assert seen == list(range(4 * kept[1] + 1, 25))
    assert sha256(out / "conflict.safetensors") == whole
    assert [path.name for path in out.iterdir()] == ["conflict.safetensors"]
