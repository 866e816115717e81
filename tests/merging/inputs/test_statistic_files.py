"""Statistics next to the weights: each belongs to its expert; folders stand for files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.errors import InputError, UsageError
from demerge.merging import MergeSession, Recipe, merge
from demerge.merging import plan as plan_merge
from demerge.provenance import MEASURED, measured_on
from demerge.statistics import Collected, commit_statistic
from demerge.storage.atomic import sha256
from demerge.storage.checkpoint import Checkpoint, content_sha256
from demerge.timesteps import TimestepRange

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
SPANS = ([0, 500], [500, 1000])


@pytest.fixture
def experts(tmp_path: Path, add_expert: Callable[..., Path]) -> list[Path]:
    """Two experts of other weights, without statistics."""
    made = [add_expert(tmp_path / "experts" / f"{a:04d}-{b:04d}", a, b) for a, b in SPANS]
    for i, expert in enumerate(made):
        save_file(
            {n: t + 0.01 * (i + 1) for n, t in load_file(expert / WEIGHTS).items()},
            expert / WEIGHTS,
        )
    return made


def measure(folder: Path, name: str, model: Path, span: list[int]) -> Path:
    """Write a statistic with the record of `demerge stats`; the values tell the ranges apart."""
    tensors = load_file(model / WEIGHTS)
    if name == "gram":
        values = {
            n: torch.eye(t.shape[1]) * (1 + span[0]) for n, t in tensors.items() if t.ndim == 2
        }
    else:
        values = {n: torch.full_like(t, 1.0 + span[0]) for n, t in tensors.items()}
    inputs = {
        "model_sha256": content_sha256(Checkpoint.open(model)),
        "data": "d",
        "data_fingerprint": "f",
        "range": span,
    }
    commit_statistic(folder, name, Collected(values, {}), inputs, {"samples": 1})
    return folder / f"{name}.safetensors"


def merged(
    tiny: Path, experts: list[Path], name: str, files: list[Path] | str | None = None
) -> None:
    """Check a merge by `fisher` or `gram` as far as it goes before it runs."""
    options = (
        None
        if files is None
        else {name: files if isinstance(files, str) else ",".join(map(str, files))}
    )
    plan_merge(
        Recipe.of(
            tiny, experts, method={"fisher": "fisher", "gram": "regmean"}[name], options=options
        )
    )


@pytest.mark.parametrize("name", ["fisher", "gram"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("at_base", [False, True])
def test_files_in_another_order_are_refused(
    tiny: Path, experts: list[Path], tmp_path: Path, name: str, moved: bool, at_base: bool
) -> None:
    models = [tiny, tiny] if at_base else experts
    files = [
        measure(tmp_path / str(i), name, model, span)
        for i, (model, span) in enumerate(zip(models, SPANS, strict=True))
    ]
    if moved:  # away from their stats.json
        files = [file.rename(tmp_path / f"{i}.safetensors") for i, file in enumerate(files)]
    merged(tiny, experts, name, files)
    with pytest.raises(InputError) as refused:
        merged(tiny, experts, name, files[::-1])
    assert (
        f"{name} {files[1]} was measured on 0500-1000, not on 0000-0500, and is given for {experts[0]}"
        in refused.value.what
    )
    assert refused.value.fix.endswith(f"--option {name}={files[0]},{files[1]}")


def test_the_record_beside_older_files_counts_too(
    tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    files = [measure(tmp_path / str(i), "fisher", tiny, span) for i, span in enumerate(SPANS)]
    for file in files:
        save_file(load_file(file), file)  # as files were before they had metadata
        assert MEASURED not in Checkpoint.open(file).metadata
    with pytest.raises(InputError, match="was measured on 0500-1000"):
        merged(tiny, experts, "fisher", files[::-1])
    (files[1].parent / "stats.json").write_text(
        json.dumps({"fisher": {"inputs": {"range": "all"}}})
    )
    with pytest.raises(
        InputError, match=r"stats\.json: fisher\.inputs\.range: must be a valid array"
    ):
        merged(tiny, experts, "fisher", files)
    for file in files:
        (file.parent / "stats.json").unlink()
        assert measured_on(Checkpoint.open(file)) is None
    merged(tiny, experts, "fisher", files[::-1])  # nothing is recorded that could contradict


def test_ranges_of_options_count_as_those_of_records(
    tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    files = [measure(tmp_path / str(i), "fisher", tiny, span) for i, span in enumerate(SPANS)]
    for expert in experts:
        (expert / "expert.json").unlink()
    given = {"method": "fisher", "options": {"fisher": ",".join(map(str, files[::-1]))}}
    plan_merge(Recipe.of(tiny, experts, **given))
    with pytest.raises(InputError, match="was measured on 0500-1000"):
        plan_merge(
            Recipe.of(tiny, experts, ranges=[TimestepRange(*span) for span in SPANS], **given)
        )


def test_the_model_counts_where_ranges_are_alike(
    tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    for expert in experts:
        (expert / "expert.json").write_text(json.dumps({"range": [0, 1000]}))
    files = [measure(expert, "fisher", expert, [0, 1000]) for expert in experts]
    merged(tiny, experts, "fisher")
    with pytest.raises(InputError) as refused:
        merged(tiny, experts, "fisher", files[::-1])
    assert "which is neither this expert's nor the base's" in refused.value.what
    assert refused.value.fix.endswith(f"--option fisher={files[0]},{files[1]}")
    shutil.copyfile(experts[0] / WEIGHTS, experts[1] / WEIGHTS)
    with pytest.raises(InputError) as stale:
        merged(tiny, experts, "fisher")
    assert (
        stale.value.fix
        == f"remove it and make it again: demerge stats {experts[1]} --data D --statistics fisher"
    )


def test_one_file_for_two_ranges_is_refused(
    tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    file = measure(tmp_path / "one", "fisher", tiny, SPANS[0])
    with pytest.raises(InputError) as refused:
        merged(tiny, experts, "fisher", [file, file])
    assert (
        refused.value.fix.startswith("name that of this expert")
        and str(experts[1]) in refused.value.fix
    )


def test_a_session_refuses_them_too(tiny: Path, experts: list[Path]) -> None:
    files = [
        measure(expert, "fisher", expert, span) for expert, span in zip(experts, SPANS, strict=True)
    ]
    MergeSession(tiny, experts, method="fisher")
    with pytest.raises(InputError, match="was measured on 0500-1000"):
        MergeSession(tiny, experts, method="fisher", inputs={"fisher": files[::-1]})
    with pytest.raises(UsageError, match="1 ranges for 2 experts"):
        MergeSession(tiny, experts, method="fisher", ranges=[None])
    MergeSession(
        tiny, experts, method="fisher", inputs={"fisher": [load_file(file) for file in files[::-1]]}
    )


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_stands_for_the_file_in_it_or_those_of_the_ranges(
    tiny: Path, experts: list[Path], tmp_path: Path
) -> None:
    made = [
        measure(tmp_path / "map" / "fisher" / e.name, "fisher", tiny, s)
        for e, s in zip(experts, SPANS, strict=True)
    ]
    for name, files in (
        ("files", made),
        ("folders", [file.parent for file in made]),
        ("all", [tmp_path / "map" / "fisher"]),
    ):
        options = {"fisher": ",".join(map(str, files))}
        merge(tiny, experts, tmp_path / f"{name}.safetensors", method="fisher", options=options)
        recipe = Recipe.read(tmp_path / f"{name}.safetensors")
        assert [list(e.inputs["fisher"].values()) for e in recipe.experts] == [
            [sha256(file)] for file in made
        ]
    with pytest.raises(InputError) as refused:
        merged(tiny, experts, "fisher", [tmp_path / "map"])
    assert f"{tmp_path / 'map'} is a folder and has no fisher.safetensors" in refused.value.what
    assert refused.value.fix.endswith(",".join(map(str, made)))


@pytest.mark.parametrize(
    ("name", "command"),
    [("fisher", "demerge analyze BASE --data D --fisher"), ("gram", "--statistics gram")],
)
def test_what_is_missing_is_made_by_a_command(
    tiny: Path, experts: list[Path], name: str, command: str
) -> None:
    with pytest.raises(UsageError) as refused:
        merged(tiny, experts, name)
    assert (
        "demerge stats EXPERT... --data D --statistics" in refused.value.fix
        and command in refused.value.fix
    )
