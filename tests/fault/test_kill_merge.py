"""SIGKILL at any moment of a merge: the output is whole or absent; the next merge cleans up."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from demerge.merging import Recipe, merge
from demerge.merging import plan as plan_merge
from demerge.storage.atomic import sha256


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_merge_leaves_all_or_nothing(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name in ("base", "expert"):
        save_file(
            {str(i): torch.randn(300_000) for i in range(8)}, tmp_path / f"{name}.safetensors"
        )
    base, expert = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    whole = sha256(merge(base, [expert], tmp_path / "whole.safetensors", method="ties").path)
    random, out, killed = np.random.default_rng(0), tmp_path / "out.safetensors", 0
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                merge(base, [expert], out, method="ties", num_workers=2)
            finally:
                os._exit(0)
        time.sleep(float(random.uniform(0.01, 0.25)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if out.exists():
            assert sha256(out) == whole
            out.unlink()
    assert killed >= 3
    merge(base, [expert], out, method="ties")
    assert sha256(out) == whole
    assert not list(tmp_path.glob(".*"))


def killed_at(step: int, work: Callable[[], object]) -> int:
    """Kill a child just before its `step`-th rename; return -9, or how many renames it has."""
    child = os.fork()
    if child == 0:
        done = count(1)
        for name in ("rename", "replace"):
            real = getattr(os, name)

            def renamed(*paths: object, real: Callable[..., object] = real) -> object:
                if next(done) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*paths)

            setattr(os, name, renamed)
        try:
            work()
        finally:
            os._exit(next(done) - 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, those of temporary names, too."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_merge_killed_between_its_parts_comes_with_its_report_or_not_at_all(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(
        "demerge.reporting.theme.render", lambda *_: b"<svg/>"
    )  # drawing takes a second each time
    monkeypatch.setattr("demerge.storage.hashing._remember", lambda *_: None)  # one rename less

    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        plan_merge(
            Recipe.of(tiny, [tiny, tiny], method="ties"),
            num_workers=1,
            out=folder / name,
            report=True,
        ).run()

    n = killed_at(0, lambda: work(tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    pages = {page for page in whole if page.endswith("index.html")}
    assert len(pages) == 1
    for step in sorted({1, n - 1, n}):
        place = tmp_path / str(step)
        assert killed_at(step, lambda place=place: work(place)) == -9
        assert not (place / name).exists() or content(place) == whole
        work(place)
        assert content(place) == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_statistics_killed_between_two_files_are_recorded_as_they_are(
    tiny: Path, tmp_path: Path
) -> None:
    from demerge.statistics import StatisticsOptions, plan

    torch.set_num_threads(1)

    def work(out: Path) -> None:
        plan(
            StatisticsOptions(
                models=[str(tiny)], data="digits", ranges="0:500", out=out, samples=2, device="cpu"
            )
        ).run()

    work(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    for step in (1, 2, 3):
        place = tmp_path / str(step)
        assert killed_at(step, lambda place=place: work(place)) == -9
        for record in place.glob("*/stats.json"):
            named = [key for key in json.loads(record.read_text()) if key != "format"]
            assert named == ["fisher", "gram"] and all(
                (record.parent / f"{key}.safetensors").is_file() for key in named
            )
        work(place)
        assert content(place) == whole
