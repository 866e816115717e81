"""SIGKILL at any moment of an analysis: finished groups stay, the same command goes on, and the map has the same bytes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from demerge.analysis.measurement.options import AnalyzeInputs, MeasurementOptions
from demerge.analysis.planning.analyze import Plan, plan
from demerge.storage.atomic import sha256


def planned(tiny: Path, out: Path) -> Plan:
    inputs = AnalyzeInputs(model=str(tiny), data="digits", out=out, device="cpu")
    options = MeasurementOptions(bins=4, groups=5, batch_size=2, engine="sketch", metric="adam")
    return plan(inputs, options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_analysis_goes_on(tiny: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    planned(tiny, tmp_path / "whole").measure()
    whole = sha256(tmp_path / "whole" / "conflict.safetensors")
    out, kept = tmp_path / "out", []
    folder = out / "conflict.partial"
    for enough in (1, 3):
        child = os.fork()
        if child == 0:
            try:
                planned(tiny, out).measure()
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
    planned(tiny, out).measure(lambda done, total, text: seen.append(done))
    assert seen == list(range(4 * kept[1] + 1, 25))
    assert sha256(out / "conflict.safetensors") == whole
    assert [path.name for path in out.iterdir()] == ["conflict.safetensors"]
