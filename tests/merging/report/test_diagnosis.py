"""Diagnostics: against direct computation in float64, the same for any number of threads, and a
report that loads nothing."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging import Recipe
from demerge.merging import plan as plan_merge
from demerge.merging.report.diagnosis import Sums
from demerge.merging.report.page import finding, to_csv
from demerge.reporting.theme import Pictures

K = 3
SHAPES = {
    "conv_in.weight": (4, 3),
    "down_blocks.0.resnets.0.conv1.weight": (8, 3, 3, 3),
    "down_blocks.0.resnets.0.conv1.bias": (8,),
    "mid_block.resnets.0.conv1.weight": (5, 5),
    "conv_out.weight": (0, 4),
    "=cmd()<script>.weight": (3,),
}
Tensors = dict[str, Tensor]


@pytest.fixture
def blank_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests look at numbers, not at plots, which take seconds to draw."""
    blank = Pictures(b"<svg/>", b"<svg/>", b"png")
    monkeypatch.setattr("demerge.merging.report.page.pictures", lambda draw: blank)


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[Path], list[Tensors]]:
    """A base and three experts, the third of which moves nothing in the middle."""
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    experts = [
        {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(K)
    ]
    experts[2]["mid_block.resnets.0.conv1.weight"] = base["mid_block.resnets.0.conv1.weight"]
    paths = []
    for i, tensors in enumerate([base, *experts]):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths, [base, *experts]


def run(paths: list[Path], out: Path, threads: int = 1, **asked: object) -> dict[str, object]:
    recipe = Recipe.of(paths[0], paths[1:], method="ties", options={"density": 0.3}, **asked)  # type: ignore[arg-type]
    plan_merge(recipe, num_workers=threads, out=out, report=out.with_suffix(".report")).run()
    document: dict[str, object] = json.loads(
        (out.with_suffix(".report") / "diagnosis.json").read_text()
    )
    return document


@pytest.mark.usefixtures("blank_plots")
def test_the_numbers_are_those_of_a_direct_computation(
    files: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    paths, (base, *experts) = files
    document = run(paths, tmp_path / "out.safetensors", save_dtype="bfloat16")
    merged = load_file(tmp_path / "out.safetensors")
    exact = run(paths, tmp_path / "exact.safetensors")
    held = load_file(tmp_path / "exact.safetensors")
    groups = {
        "in": ["conv_in.weight"],
        "down.0": [n for n in SHAPES if n.startswith("down")],
        "model": list(SHAPES),
    }
    rows = {row["name"]: row for row in [*document["blocks"], document["model"]]}  # type: ignore[misc, index]
    for block, names in groups.items():
        tau = torch.stack(
            [
                torch.cat([(e[n].double() - base[n].double()).flatten() for n in names])
                for e in experts
            ]
        )
        row = rows[block]
        np.testing.assert_allclose(row["norms"], tau.norm(dim=1), rtol=1e-12)
        np.testing.assert_allclose(row["cosines"], cosines(tau), rtol=1e-9, atol=1e-12)
        moved = (tau != 0).any(0)
        assert row["sign_conflict"] == int(((tau > 0).any(0) & (tau < 0).any(0)).sum()) / int(
            moved.sum()
        )
        s = torch.linalg.svdvals(tau)
        p = s / s.sum()
        assert row["effective_rank"] == pytest.approx(
            float(torch.exp(-(p * p.log()).sum())), rel=1e-9
        )
        assert row["entries"] == tau.shape[1]
        stored = torch.cat([(merged[n] != base[n].bfloat16()).flatten() for n in names])
        assert row["kept"] * row["survived"] * row["entries"] == pytest.approx(int(stored.sum()))
        assert 0 < row["kept"] < 1 and 0 < row["survived"] <= 1
        distance = math.sqrt(
            sum(float((held[n].double() - base[n].double()).square().sum()) for n in names)
        )
        found = {r["name"]: r for r in [*exact["blocks"], exact["model"]]}[block]  # type: ignore[misc, index]
        assert found["distance"] == pytest.approx(distance, rel=1e-6)


def cosines(tau: Tensor) -> Tensor:
    unit = tau / tau.norm(dim=1, keepdim=True)
    return unit @ unit.T


@pytest.mark.usefixtures("blank_plots")
def test_a_task_vector_of_zero_has_no_direction(
    files: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    document = run(files[0], tmp_path / "out.safetensors")
    middle = next(row for row in document["blocks"] if row["name"] == "mid")  # type: ignore[attr-defined]
    assert middle["norms"][2] == 0 and middle["cosines"][2] == [0, 0, 0]
    assert middle["effective_rank"] <= 2
    still = Sums("x", 4, torch.zeros(2, 2, dtype=torch.float64), 0, 0, 0, 0, 0.0)
    assert (still.effective_rank, still.shares) == (
        0.0,
        {"sign_conflict": 0.0, "kept": 0.0, "survived": 1.0},
    )


def test_the_report_does_not_depend_on_threads(
    files: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    folders = []
    for threads in (1, 3):
        (tmp_path / str(threads)).mkdir()
        run(files[0], tmp_path / str(threads) / "out.safetensors", threads)
        folders.append(tmp_path / str(threads) / "out.report")
    names = sorted(p.name for p in folders[0].iterdir())
    assert names == [
        "agreement.png",
        "agreement.svg",
        "blocks.csv",
        "diagnosis.json",
        "index.html",
        "kept.png",
        "kept.svg",
        "lengths.png",
        "lengths.svg",
        "tensors.csv",
    ]
    assert all(
        (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names
    )


@pytest.mark.usefixtures("blank_plots")
def test_the_tables(files: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    document = run(files[0], tmp_path / "out.safetensors", only=["mid", "in"])
    with (tmp_path / "out.report" / "tensors.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["conv_in.weight", "mid_block.resnets.0.conv1.weight"]
    assert [row["block"] for row in rows] == ["in", "mid"]
    assert float(rows[0]["norm_1"]) == pytest.approx(document["tensors"][0]["norms"][1], rel=1e-8)  # type: ignore[index]
    assert float(rows[0]["cos_0_2"]) == pytest.approx(
        document["tensors"][0]["cosines"][2][0], rel=1e-8
    )  # type: ignore[index]
    hostile = Sums("=cmd()", 1, torch.ones(1, 1, dtype=torch.float64), 1, 0, 1, 1, 1.0)
    assert to_csv([hostile]).splitlines()[1].startswith("'=cmd()")


def test_the_first_line_says_what_was_found_and_what_to_do() -> None:
    gram = torch.eye(2, dtype=torch.float64)
    rows = {
        "--save-dtype float32": Sums("model", 100, gram, 90, 10, 80, 40, 1.0),
        "--method ties": Sums("model", 100, gram, 90, 60, 80, 80, 1.0),
        "demerge evaluate": Sums("model", 100, gram, 90, 10, 80, 80, 1.0),
    }
    for advice, sums in rows.items():
        assert finding(sums).startswith("The merge changes 80.0% of the weights")
        assert advice in finding(sums)


def test_the_page_loads_and_runs_nothing(
    files: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    run(files[0], tmp_path / "<b>out.safetensors")
    page = (tmp_path / "<b>out.report" / "index.html").read_text()
    assert "default-src 'none'" in page and "<script" not in page and "<b>out" not in page
    found: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attrs if name in ("src", "srcset", "href"))

    Sources().feed(page)
    assert found and all(value.startswith("data:image/") for value in found)
    assert re.search(r"sign conflict", page) and "mid" in page


@pytest.mark.usefixtures("blank_plots")
def test_a_pipeline_and_an_adapter_have_a_report_too(
    tiny: Path, add_expert: Callable[..., Path], tmp_path: Path, make_tiny: Callable[..., Path]
) -> None:
    other = make_tiny(seed=1)
    plan_merge(
        Recipe.of(tiny, [other], weights=[1]), tmp_path / "out", report=tmp_path / "report"
    ).run()
    blocks = json.loads((tmp_path / "report" / "diagnosis.json").read_text())["blocks"]
    assert [row["name"] for row in blocks] == [
        "in",
        "time",
        "down.0",
        "down.1",
        "mid",
        "up.0",
        "up.1",
        "out",
    ]
    result = plan_merge(
        Recipe.of(tiny, [other], lora_rank=2), tmp_path / "lora", report=tmp_path / "lora-report"
    ).run()
    assert result.adapter is not None and 0 < result.adapter.share < 1
    assert (tmp_path / "lora-report" / "index.html").is_file()
    with pytest.raises(UsageError, match="report exists already"):
        plan_merge(
            Recipe.of(tiny, [other], weights=[1]), tmp_path / "new", report=tmp_path / "report"
        ).run()
    assert not (tmp_path / "new").exists()
