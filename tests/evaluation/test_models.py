from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from demerge.diffusion.routing import RoutedDenoiser
from demerge.errors import InputError, UsageError
from demerge.evaluation.models import detect_kind, is_report, leave_out_reports, specify_models
from demerge.evaluation.report.report import Report
from demerge.evaluation.results import SHOWN, load_scores, read_strip, save_scores
from demerge.evaluation.scores import Scores
from demerge.reporting.html import render_page
from demerge.reporting.theme import render


def pipeline(folder: Path, **records: object) -> str:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"num_train_timesteps": 1000})
    )
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return str(folder)


def test_kinds_by_their_records(tmp_path: Path) -> None:
    part, whole = {"range": [0, 500]}, {"range": [0, 1000]}
    models = [
        pipeline(tmp_path / "mine"),
        pipeline(tmp_path / "other"),
        pipeline(tmp_path / "experts" / "0000-0500", expert=part),
        pipeline(tmp_path / "joint" / "0000-1000", expert=whole),
        pipeline(tmp_path / "merged" / "ties", demerge={"experts": [part, {"range": [500, 1000]}]}),
        pipeline(tmp_path / "merged" / "joint-0.5", demerge={"experts": [whole]}),
        str(tmp_path / "experts"),
    ]
    (tmp_path / "pictures").mkdir()
    found = specify_models([*models, str(tmp_path / "pictures"), "google/ddpm-cifar10-32"])
    assert [(e.name, e.kind) for e in found] == [
        ("mine", "base"),
        ("other", "model"),
        ("0000-0500", "expert"),
        ("joint", "joint"),
        ("ties", "merge"),
        ("joint-0.5", "joint"),
        ("routed ensemble", "ensemble"),
        ("pictures", "model"),
        ("google/ddpm-cifar10-32", "model"),
    ]
    assert [e.is_images for e in found] == [False] * 7 + [True, False]
    assert found[-1].slug == "google-ddpm-cifar10-32"


def test_the_folder_of_a_joint_control_is_the_control(tmp_path: Path) -> None:
    """`finetune --ranges joint -o run/joint` prints run/joint; routed by timestep, it would be called an ensemble."""
    base, control = (
        pipeline(tmp_path / "mine"),
        pipeline(tmp_path / "joint" / "0000-1000", expert={"range": [0, 1000]}),
    )
    found = specify_models([base, str(tmp_path / "joint"), f"half={tmp_path / 'joint'}"])
    assert [(e.name, e.kind, e.source) for e in found[1:]] == [
        ("joint", "joint", control),
        ("half", "joint", control),
    ]


def test_names_and_the_base_can_be_given(tmp_path: Path) -> None:
    a, b = pipeline(tmp_path / "x" / "unet"), pipeline(tmp_path / "y" / "unet")
    assert [(e.name, e.kind) for e in specify_models([a, f"best={b}"], base=b)] == [
        ("unet", "model"),
        ("best", "base"),
    ]
    assert [e.name for e in specify_models([a, b])] == ["x/unet", "y/unet"]
    with pytest.raises(UsageError, match="named"):
        specify_models([a, a])
    with pytest.raises(UsageError, match="no model"):
        specify_models([])


def test_damaged_records_are_named(tmp_path: Path) -> None:
    pipeline(tmp_path / "m")
    (tmp_path / "m" / "expert.json").write_text("{")
    with pytest.raises(InputError, match=r"expert\.json"):
        detect_kind(tmp_path / "m")
    (tmp_path / "m" / "expert.json").write_text("[]")
    with pytest.raises(InputError, match="object"):
        detect_kind(tmp_path / "m")


def test_scores_and_strips_round_trip(
    make_scores: Callable[..., list[Scores]], noise: Callable[..., Tensor], tmp_path: Path
) -> None:
    images = noise(20, 3, 8)
    for score in make_scores("ties", "merge", [7.0, 7.1]):
        save_scores(
            tmp_path / f"ties.seed{score.seed}.json",
            score,
            images if score.seed == 0 else noise(20, 3, 8, seed=1),
        )
    scores, contact = load_scores(tmp_path)
    assert [s.seed for s in scores] == [0, 1]
    assert torch.equal(contact["ties"], images[:SHOWN])
    with pytest.raises(InputError, match="no scores"):
        load_scores(tmp_path / "absent")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"bad\.png"):
        read_strip(tmp_path / "bad.png")


def png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(path)
    return path


def test_plots_of_ours_are_no_model(
    make_scores: Callable[..., list[Scores]], noise: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Folders of every kind of report, of this version and older ones; and folders of images, which are none."""
    old = tmp_path / "merged" / "ties-report"
    png(old / "lengths.png")
    (old / "lengths.svg").write_text("<svg/>")
    (old / "index.html").write_text(render_page("What the merge did", "", [], ""))
    scores = make_scores("ties", "merge", [7.0])
    Report.of([*scores, *make_scores("base", "base", [8.0])]).save(tmp_path / "run" / "report")
    save_scores(tmp_path / "run" / "scores" / "ties.seed0.json", scores[0], noise(20))
    plots = png(tmp_path / "plots" / "heat.png").parent
    (plots / "heat.svg").write_bytes(render(Figure()))
    reports = [
        old,
        tmp_path / "run" / "report",
        tmp_path / "run" / "scores",
        tmp_path / "run",
        plots,
    ]
    assert [is_report(folder) for folder in reports] == [True] * 5

    emoji = png(tmp_path / "emoji" / "u1.png").parent
    (emoji / "u1.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (emoji / "u1.json").write_text("{}")
    (emoji / "gallery.html").write_text("<!doctype html><title>my samples</title>")
    model = pipeline(tmp_path / "merged" / "ties", demerge={"experts": [{"range": [0, 500]}]})
    (tmp_path / "merged" / "ties" / "report").mkdir()
    (tmp_path / "merged" / "ties" / "report" / "index.html").write_text(
        render_page("What the merge did", "", [], "")
    )
    assert not is_report(emoji)
    assert not is_report(Path(model)), "a merge with its report inside is a merge"

    kept, left_out = leave_out_reports([model, str(old)])
    assert (kept, left_out) == ([model], [str(old)])
    for alone in ([str(old)], [model, f"mine={old}"]):
        with pytest.raises(UsageError, match="plots that demerge wrote"):
            specify_models(leave_out_reports(alone)[0])


def test_models_of_a_table_have_their_names_and_kinds(tmp_path: Path) -> None:
    a, b = pipeline(tmp_path / "a"), pipeline(tmp_path / "b")
    found = specify_models({"start": a, "mine": Path(b)}, kinds={"mine": "merge"})
    assert [(e.name, e.kind, e.source) for e in found] == [
        ("start", "base", a),
        ("mine", "merge", b),
    ]
    assert [e.kind for e in specify_models({"start": a, "mine": b}, base="mine")] == [
        "model",
        "base",
    ]


def test_names_of_any_bytes_become_names_that_files_can_hold(tmp_path: Path) -> None:
    hostile = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\x1b[31m\xff-model")
    pipeline(Path(hostile))
    long = pipeline(tmp_path / ("ö" * 120))
    other = pipeline(tmp_path / ("ö" * 119 + "x"))
    found = specify_models([hostile, long, other])
    assert [e.source for e in found] == [hostile, long, other]
    assert found[0].name == "\ufffd[31m\ufffd-model"
    assert all(len(e.slug.encode()) <= 180 for e in found)
    assert len({e.slug for e in found}) == 3


def test_a_pipeline_of_two_denoisers_is_a_routed_ensemble(
    tiny_family: Callable[[str], Path],
) -> None:
    (two,) = specify_models([tiny_family("wan")])
    assert (two.name, two.kind) == ("routed ensemble", "ensemble")
    model = two.load(resolution=16)
    assert isinstance(model.denoiser, RoutedDenoiser), "it needs no base"
    assert model.denoiser.partition.cuts == [875]
