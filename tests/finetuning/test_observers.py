"""What watches a training: files of losses, previews and trackers, and that none changes it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.finetuning import FinetuneOptions, finetune, trackers
from demerge.finetuning.losses import LossFiles, loss_table, name_bins
from demerge.finetuning.previews import Previews
from demerge.finetuning.trackers import Trackers
from demerge.finetuning.train import check_output, train_ranges
from demerge.finetuning.trainer import Job
from demerge.timesteps import TimestepRange

FAST = FinetuneOptions(
    max_train_steps=5, train_batch_size=4, checkpointing_steps=2, logging_steps=2, num_previews=3
)
SPAN = TimestepRange(0, 500)


@pytest.fixture(autouse=True)
def no_state_is_left() -> Iterator[None]:
    """Let no later test find the state of processes that a tracker made."""
    yield
    PartialState._reset_state()


def train(base: Diffusion, data: ImageData, out: Path, options: FinetuneOptions = FAST) -> str:
    for _ in finetune(base, data, [SPAN], options, out):
        pass
    return Diffusion.load(out / str(SPAN)).sha256


def watch(base: Diffusion, data: ImageData, out: Path, observer: Any, told: list[str]) -> str:
    """Train with one observer."""
    inputs = check_output(base, data, [SPAN], FAST, out)
    job = Job(base, data, FAST, inputs, tell=told.append, observers=(observer,))
    for _ in train_ranges(job, [SPAN], out):
        pass
    return Diffusion.load(out / str(SPAN)).sha256


# -- losses ----------------------------------------------------------------------------------------


@pytest.fixture
def real_loss_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the losses, which the other tests leave out."""
    monkeypatch.delitem(sys.modules, "demerge.finetuning.loss_plot")


@pytest.mark.usefixtures("real_loss_plots")
def test_the_table_has_the_numbers_of_the_log(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    train(Diffusion.load(tiny), data, tmp_path)
    folder = tmp_path / str(SPAN)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    assert [int(row["step"]) for row in rows] == [line["step"] for line in log] == [2, 4, 5]
    for row, line in zip(rows, log, strict=True):
        assert float(row["loss"]) == line["loss"]
        values = [None if row[name] == "" else float(row[name]) for name in name_bins(1000, 10)]
        assert values == line["loss_by_bin"]
    assert "0900-1000" in (folder / "losses.svg").read_text()


@pytest.mark.usefixtures("real_loss_plots")
def test_two_trainings_leave_the_same_files(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(Diffusion.load(tiny), data, tmp_path / name)
    for file in ("losses.csv", "losses.svg"):
        a, b = (tmp_path / name / str(SPAN) / file for name in ("a", "b"))
        assert a.read_bytes() == b.read_bytes()


def test_bins_are_named_by_their_timesteps() -> None:
    assert name_bins(1000, 10)[:2] == ["0000-0100", "0100-0200"]
    names = name_bins(25, 10)
    for t in range(25):
        start, stop = map(int, names[t * 10 // 25].split("-"))
        assert start <= t < stop


def test_an_empty_bin_is_an_empty_cell() -> None:
    lines = [{"step": 1, "loss": 0.5, "loss_by_bin": [0.5, None]}]
    assert loss_table(lines, ["0000-0002", "0002-0004"]).splitlines()[1] == "1,0.5,0.5,"


# -- previews --------------------------------------------------------------------------------------


def test_previews_change_no_bit_of_the_expert(
    make_tiny: Callable[..., Path], data: ImageData, tmp_path: Path
) -> None:
    folder = make_tiny(dropout=0.2)
    without = train(Diffusion.load(folder), data, tmp_path / "without")
    base = Diffusion.load(folder)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    seen = train(base, data, tmp_path / "seen", replace(FAST, preview_steps=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert seen == without
    assert not base.denoiser.training
    strip = Image.open(tmp_path / "seen" / str(SPAN) / "preview.png")
    assert strip.size == (3 * 10 * 8, 2 * 10 * 8)  # 8 x 8 images with a gap, eight times as large


def test_the_base_is_above_and_the_expert_below(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base, options = Diffusion.load(tiny), replace(FAST, preview_steps=2, max_train_steps=50)
    run = finetune(base, data, [SPAN], options, tmp_path, stop=lambda: False)
    for step in run:
        if step.step == 4:
            break
    state = tmp_path / "state" / str(SPAN)
    names = sorted(path.name for path in state.glob("*.png"))
    assert names == ["preview-00000002.png", "preview-00000004.png"]
    first, second = (Image.open(state / name) for name in names)
    upper = (0, 0, first.width, first.height // 2)
    assert first.crop(upper).tobytes() == second.crop(upper).tobytes()
    assert first.tobytes() != second.tobytes()
    run.close()  # type: ignore[attr-defined]


def test_previews_of_a_text_to_image_base(
    tiny_text: Path, image_folder: Path, tmp_path: Path
) -> None:
    captioned = load_images(image_folder, resolution=16, channels=3)
    options = replace(FAST, preview_steps=1, max_train_steps=2)
    train(Diffusion.load(tiny_text), captioned, tmp_path, options)
    assert Image.open(tmp_path / str(SPAN) / "preview.png").mode == "RGB"


def test_a_preview_that_fails_is_one_line(
    tiny: Path, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("demerge.finetuning.previews.sample", fail)
    told: list[str] = []
    inputs = check_output(Diffusion.load(tiny), data, [SPAN], FAST, tmp_path)
    options = replace(FAST, preview_steps=5)
    job = Job(
        Diffusion.load(tiny), data, options, inputs, tell=told.append, observers=(Previews(),)
    )
    list(train_ranges(job, [SPAN], tmp_path))
    assert told == ["no preview at step 5 of 0000-0500: no memory"]
    assert not list(tmp_path.rglob("*.png"))


# -- trackers --------------------------------------------------------------------------------------


class Fake:
    """A tracker that keeps what it gets; `fails` names the call that does not work."""

    made: ClassVar[list[Fake]] = []
    fails = ""

    def __init__(self, run: str, folder: Path) -> None:
        self.run, self.folder, self.lines, self.closed = run, folder, [], False  # type: ignore[var-annotated]
        Fake.made.append(self)

    def start(self) -> None:
        self._check("start")

    def log(self, values: dict[str, float], step: int) -> None:
        self._check("log")
        self.lines.append((step, values))

    def finish(self) -> None:
        self._check("finish")
        self.closed = True

    def _check(self, call: str) -> None:
        if call == Fake.fails:
            raise RuntimeError(f"{call} is broken\nand more")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fails", "")
    monkeypatch.setattr(
        "accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"tensorboard": Fake}, raising=True
    )
    return Fake


def test_a_tracker_gets_each_line_of_the_log(
    tiny: Path, data: ImageData, tmp_path: Path, fake: type[Fake]
) -> None:
    told: list[str] = []
    tracker = Trackers(("tensorboard",), tmp_path / "logs")
    watch(Diffusion.load(tiny), data, tmp_path, tracker, told)
    (made,) = fake.made
    assert (made.run, made.folder, made.closed, told) == (str(SPAN), tmp_path / "logs", True, [])
    assert [step for step, _ in made.lines] == [2, 4, 5]
    log = (tmp_path / str(SPAN) / "log.jsonl").read_text().splitlines()
    values, line = made.lines[0][1], json.loads(log[0])
    assert values["loss"] == line["loss"]
    assert values["learning_rate"] == FAST.learning_rate and values["skipped_steps"] == 0
    assert values["images_per_second"] > 0
    for name, loss in zip(name_bins(1000, 10), line["loss_by_bin"], strict=True):
        assert values.get(f"loss/{name}") == loss


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_fails_ends_nothing(
    tiny: Path, data: ImageData, tmp_path: Path, fake: type[Fake], call: str
) -> None:
    told: list[str] = []
    fake.fails = call
    tracker = Trackers(("tensorboard",), tmp_path / "logs")
    base = Diffusion.load(tiny)
    tracked = watch(base, data, tmp_path / "tracked", tracker, told)
    assert told == [f"the tracker tensorboard failed and is off: {call} is broken"]
    assert tracked == watch(base, data, tmp_path / "plain", LossFiles(), told)


def test_a_missing_package_is_named_before_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package wandb") as refused:
        trackers.check_trackers(replace(FAST, report_to=("wandb",)))
    assert "pip install wandb" in refused.value.fix
    with pytest.raises(UsageError, match="report_to is"):
        replace(FAST, report_to=("tensorbord",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_accelerates_classes_work_without_an_accelerator(
    tiny: Path, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Service(ModuleType):
        lines: ClassVar[list[tuple[int, dict[str, float]]]] = []

        def init(self, **settings: Any) -> Service:
            self.settings = settings
            return self

        def log(self, values: dict[str, float], step: int) -> None:
            Service.lines.append((step, values))

        def finish(self) -> None:
            self.is_closed = True

    PartialState._reset_state()
    service = Service(name)
    service.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, service)
    told: list[str] = []
    watch(Diffusion.load(tiny), data, tmp_path, Trackers((name,), tmp_path / "logs"), told)
    assert told == [] and service.is_closed
    assert (service.settings["project"], service.settings["name"]) == ("demerge", str(SPAN))
    assert service.settings["config"]["max_train_steps"] == FAST.max_train_steps
    assert [step for step, _ in Service.lines] == [2, 4, 5]


def test_tensorboard(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Diffusion.load(tiny), data, tmp_path, replace(FAST, report_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "logs" / str(SPAN)))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 5]
    assert "loss/0000-0100" in events.Tags()["scalars"]
