"""Training: resume equals uninterrupted to the bit, the teacher never moves, bad runs end by name."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from demerge.data import ImageData, load_images
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError, NumericalError, Preempted, UsageError
from demerge.finetuning import FinetuneOptions, finetune, parse_ranges
from demerge.finetuning.batches import Batches
from demerge.finetuning.step import Step
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.timesteps import Partition, TimestepRange

FAST = FinetuneOptions(
    max_train_steps=6,
    train_batch_size=4,
    checkpointing_steps=2,
    logging_steps=4,
    learning_rate=1e-3,
)
SPAN = TimestepRange(0, 500)


def train(
    base: Diffusion,
    data: ImageData,
    out: Path,
    options: FinetuneOptions = FAST,
    stop_at: int | None = None,
) -> str:
    steps = itertools.count(1)
    for _ in finetune(base, data, [SPAN], options, out, stop=lambda: next(steps) == stop_at):
        pass
    return Diffusion.load(out / str(SPAN)).sha256


@pytest.fixture(scope="module")
def runs(tiny: Path, data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `finished` run of `FAST`, and one that was stopped after 3 steps."""
    folder, base = tmp_path_factory.mktemp("runs"), Diffusion.load(tiny)
    train(base, data, folder / "finished")
    with pytest.raises(Preempted):
        train(base, data, folder / "unfinished", stop_at=3)
    return folder


@pytest.fixture
def finished(runs: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(runs / "finished", tmp_path / "finished"))


@pytest.fixture
def whole(runs: Path) -> str:
    """The hash of the finished expert."""
    return Diffusion.load(runs / "finished" / str(SPAN)).sha256


@pytest.mark.parametrize("stop_at", [1, 5])
def test_resumed_run_equals_the_uninterrupted_one(
    tiny: Path, data: ImageData, runs: Path, whole: str, tmp_path: Path, stop_at: int
) -> None:
    base = Diffusion.load(tiny)
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", stop_at=stop_at)
    assert not (tmp_path / "cut" / str(SPAN)).exists()
    assert train(base, data, tmp_path / "cut") == whole
    cut, log = tmp_path / "cut" / str(SPAN), runs / "finished" / str(SPAN) / "log.jsonl"
    assert (cut / "log.jsonl").read_text() == log.read_text()


def test_dropout_too_survives_a_resume(
    make_tiny: Callable[..., Path], data: ImageData, tmp_path: Path
) -> None:
    folder = make_tiny(dropout=0.3)
    torch.manual_seed(1)
    whole = train(Diffusion.load(folder), data, tmp_path / "whole")
    torch.manual_seed(2)
    with pytest.raises(Preempted):
        train(Diffusion.load(folder), data, tmp_path / "cut", stop_at=3)
    assert train(Diffusion.load(folder), data, tmp_path / "cut") == whole


def test_a_share_of_the_captions_is_left_empty(
    tiny_text: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stream of (seed, step, sample): the share is that of the option, and a resumed run leaves out the same ones."""
    base = Diffusion.load(tiny_text)
    data = load_images(image_folder, split="all", resolution=16)
    seen: list[list[str]] = []
    encode = Diffusion.encode

    def spy(self: Diffusion, images: torch.Tensor, captions: list[str], labels: None) -> object:
        seen.append(captions)
        return encode(self, images, captions, labels)

    monkeypatch.setattr(Diffusion, "encode", spy)

    def captions(share: float, steps: range = range(8)) -> list[list[str]]:
        seen.clear()
        options = replace(FAST, caption_dropout=share, train_batch_size=50)
        batches = Batches(base, data, SPAN, options)
        for step in steps:
            batches.step(step)
        return list(seen)

    whole = captions(0.1)
    assert sum(text == "" for batch in whole for text in batch) / 400 == pytest.approx(
        0.1, abs=0.045
    )
    assert captions(0.1, range(5, 8)) == whole[5:]
    assert all(text for batch in captions(0.0) for text in batch)
    assert not any(text for batch in captions(1.0) for text in batch)
    with pytest.raises(UsageError, match=r"caption_dropout is 1\.5"):
        FinetuneOptions(caption_dropout=1.5)


def test_ranges_of_one_folder_do_not_overlap_and_keep_their_states(
    tiny: Path, data: ImageData, runs: Path, tmp_path: Path
) -> None:
    base, out = Diffusion.load(tiny), Path(shutil.copytree(runs / "unfinished", tmp_path / "run"))
    with pytest.raises(UsageError, match="overlaps the range 0400-1000"):
        next(finetune(base, data, [TimestepRange(400, 1000)], FAST, out))
    for _ in finetune(base, data, [TimestepRange(500, 1000)], FAST, out):
        pass
    assert list((out / "state" / str(SPAN)).glob("step-*"))
    train(base, data, out)
    assert sorted(p.name for p in out.iterdir()) == ["0000-0500", "0500-1000"]


def test_a_foreign_folder_is_refused_before_training(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    (tmp_path / str(SPAN)).mkdir()
    (tmp_path / str(SPAN) / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="exists already"):
        next(finetune(Diffusion.load(tiny), data, [SPAN], FAST, tmp_path))


def test_torn_newest_checkpoint_falls_back_to_the_one_before(
    tiny: Path, data: ImageData, whole: str, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny)
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", stop_at=4)
    (newest,) = (tmp_path / "cut" / "state" / str(SPAN)).glob("step-*")
    file = newest / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert train(base, data, tmp_path / "cut") == whole


def test_teacher_and_base_are_unchanged_to_the_bit(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny)
    before = base.sha256
    assert train(base, data, tmp_path) != before
    assert base.sha256 == before
    assert all(p.grad is None for p in base.denoiser.parameters())


def test_consistency_pulls_the_expert_to_the_base(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny)

    def distance(name: str, consistency: float) -> float:
        train(
            base,
            data,
            tmp_path / name,
            replace(FAST, consistency=consistency, max_train_steps=20, use_ema=False),
        )
        expert = Diffusion.load(tmp_path / name / str(SPAN)).denoiser
        x, t = (
            torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
            torch.arange(0, 480, 30),
        )
        with torch.no_grad():
            return float((expert(x, t).sample - base.denoiser(x, t).sample).square().mean())

    assert distance("free", 0.0) > 2 * distance("held", 10.0)


def test_mixed_target_has_the_same_gradient(tiny: Path, data: ImageData) -> None:
    """w = 1: the two-term loss and (1 + lambda) |f - ybar|^2 differ by a constant (method.md, section 2)."""
    base = Diffusion.load(tiny)
    f, y, f0 = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.randn(3, 5)
    lam = 0.7
    two = ((f - y) ** 2 + lam * (f - f0) ** 2).sum()
    one = ((1 + lam) * (f - (y + lam * f0) / (1 + lam)) ** 2).sum()
    torch.testing.assert_close(torch.autograd.grad(two, f), torch.autograd.grad(one, f))
    assert base.prediction_type == "epsilon"


def test_finished_expert_is_left_alone_and_other_options_are_refused(
    tiny: Path, data: ImageData, finished: Path
) -> None:
    base, record = Diffusion.load(tiny), finished / str(SPAN) / "expert.json"
    before = record.stat().st_mtime_ns
    train(base, data, finished)
    assert record.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"learning_rate was 0\.001, now 0\.5"):
        train(base, data, finished, replace(FAST, learning_rate=0.5))


def test_a_record_without_a_newer_option_had_its_default(
    tiny: Path, data: ImageData, finished: Path, whole: str
) -> None:
    base = Diffusion.load(tiny)
    file = finished / str(SPAN) / "expert.json"
    record = json.loads(file.read_text())
    del record["options"]["optimizer"], record["options"]["antithetic"]
    file.write_text(json.dumps(record))
    assert train(base, data, finished) == whole
    with pytest.raises(UsageError, match="antithetic was False, now True"):
        train(base, data, finished, replace(FAST, antithetic=True))


def test_expert_is_a_stock_pipeline_with_its_record(tiny: Path, runs: Path) -> None:
    base, folder = Diffusion.load(tiny), runs / "finished" / "0000-0500"
    assert type(diffusers.DiffusionPipeline.from_pretrained(folder)) is diffusers.DDPMPipeline
    record = json.loads((folder / "expert.json").read_text())
    assert record["range"] == [0, 500]
    assert record["base_sha256"] == base.sha256
    assert record["steps"] == 6


def test_five_bad_steps_in_a_row_end_the_run(
    tiny: Path, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Step._losses
    monkeypatch.setattr(Step, "_losses", lambda *a: tuple(v * math.nan for v in losses(*a)))
    steps = 0
    with pytest.raises(NumericalError, match="5 steps in a row"):
        for _ in finetune(
            Diffusion.load(tiny), data, [SPAN], replace(FAST, max_train_steps=50), tmp_path
        ):
            steps += 1
    assert steps == 4


@pytest.mark.parametrize("of", ["parameters", "ema"])
def test_a_checkpoint_with_nan_is_never_committed(
    tiny: Path, data: ImageData, tmp_path: Path, of: str
) -> None:
    run = ExpertTraining(Job(Diffusion.load(tiny), data, FAST, {}), SPAN, tmp_path / "state")
    getattr(run if of == "parameters" else run.one_step, of)["conv_in.weight"].data[0] = math.inf
    with pytest.raises(
        NumericalError, match=r"hold NaN or Inf at step 0, first in conv_in\.weight"
    ):
        run.save_checkpoint()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_expert_that_its_dtype_cannot_hold_is_not_committed(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    options = replace(FAST, save_dtype="float16")
    run = ExpertTraining(Job(Diffusion.load(tiny), data, options, {}), SPAN, tmp_path / "state")
    run.one_step.ema["conv_in.weight"][0] = 1e6
    with pytest.raises(
        NumericalError, match=r"as float16 the expert holds NaN or Inf in conv_in\.weight"
    ):
        run.finish(tmp_path / "expert")
    assert not (tmp_path / "expert").exists()


def test_a_base_with_nan_is_refused_by_name(make_tiny: Callable[..., Path]) -> None:
    folder = make_tiny()
    base = Diffusion.load(folder)
    with torch.no_grad():
        base.denoiser.conv_out.bias.fill_(math.nan)  # type: ignore[union-attr]
    base.denoiser.save_pretrained(folder / "unet")  # type: ignore[operator]
    with pytest.raises(InputError, match=r"denoiser holds NaN or Inf in conv_out\.bias"):
        Diffusion.load(folder)


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "consistency", "snr_gamma"],
)
@pytest.mark.parametrize("value", [1e38, math.inf, math.nan, -1.0])
def test_rates_outside_their_range_are_usage_errors(name: str, value: float) -> None:
    if (name, value) not in {("consistency", 1e38), ("snr_gamma", 1e38)}:
        with pytest.raises(UsageError, match=name):
            replace(FAST, **{name: value})


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


CHANGES = {
    "schedule": (
        "scheduler/scheduler_config.json",
        {"beta_end": 0.012},
        r"scheduler\.beta_end was 0\.02, now 0\.012",
    ),
    "prediction": (
        "scheduler/scheduler_config.json",
        {"prediction_type": "v_prediction"},
        r"scheduler\.prediction_type",
    ),
    "dropout": ("unet/config.json", {"dropout": 0.1}, r"config\.dropout was 0\.0, now 0\.1"),
    "norm_eps": ("unet/config.json", {"norm_eps": 1e-3}, r"config\.norm_eps"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("run", ["unfinished", "finished"])
def test_resume_sees_a_changed_base(
    tiny: Path, data: ImageData, runs: Path, tmp_path: Path, change: str, run: str
) -> None:
    shutil.copytree(runs / run, tmp_path / "run")
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    file, values, difference = CHANGES[change]
    edit(folder / file, **values)
    with pytest.raises(UsageError, match=difference):
        train(Diffusion.load(folder), data, tmp_path / "run")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_resume_sees_another_component(
    tiny_text: Path, image_folder: Path, tmp_path: Path, part: str
) -> None:
    base = Diffusion.load(shutil.copytree(tiny_text, tmp_path / "base"))
    captioned = load_images(image_folder, resolution=16, channels=3)
    options = replace(FAST, max_train_steps=2)
    for _ in finetune(base, captioned, [SPAN], options, tmp_path / "run"):
        pass
    file = next(
        p
        for p in sorted((tmp_path / "base" / part).iterdir())
        if p.suffix in (".safetensors", ".json")
    )
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UsageError, match=rf"components\.{part}/{file.name} was"):
        next(finetune(base, captioned, [SPAN], options, tmp_path / "run"))


def test_resume_with_more_steps_equals_the_longer_run(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base, longer = (
        Diffusion.load(tiny),
        replace(FAST, max_train_steps=9, checkpointing_steps=5, logging_steps=3),
    )
    whole = train(base, data, tmp_path / "whole", longer)
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", stop_at=4)
    assert train(base, data, tmp_path / "cut", longer) == whole
    assert (
        train(base, data, tmp_path / "cut", replace(longer, logging_steps=1, checkpointing_steps=1))
        == whole
    )
    with pytest.raises(UsageError, match="max_train_steps was 9, now 12"):  # its state is gone
        train(base, data, tmp_path / "cut", replace(longer, max_train_steps=12))


def test_resume_with_more_steps_is_refused_if_the_steps_taken_would_differ(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base, decaying = Diffusion.load(tiny), replace(FAST, lr_scheduler="cosine")
    with pytest.raises(Preempted):
        train(base, data, tmp_path, decaying, stop_at=4)
    with pytest.raises(UsageError, match="max_train_steps was 6, now 9"):
        train(base, data, tmp_path, replace(decaying, max_train_steps=9))
    with pytest.raises(UsageError, match="max_train_steps was 6, now 3"):
        train(base, data, tmp_path, replace(decaying, max_train_steps=3))


def test_accumulated_batches_equal_one_batch(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    big = ExpertTraining(
        Job(base, data, replace(FAST, train_batch_size=8), {}), SPAN, tmp_path / "a"
    )
    small = ExpertTraining(
        Job(base, data, replace(FAST, gradient_accumulation_steps=2), {}), SPAN, tmp_path / "b"
    )
    for run in (big, small):
        run.take_step()
    for name, p in big.parameters.items():
        torch.testing.assert_close(p, small.parameters[name], rtol=1e-3, atol=1e-5)


def test_text_to_image_expert(
    tiny_text: Path, data: ImageData, image_folder: Path, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny_text)
    captioned = load_images(image_folder, resolution=16, channels=3)
    options = replace(FAST, max_train_steps=2)
    assert [p.step for p in finetune(base, captioned, [SPAN], options, tmp_path)] == [1, 2]
    assert (
        type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "0000-0500"))
        is diffusers.StableDiffusionPipeline
    )


def test_ranges_from_text(tmp_path: Path) -> None:
    Partition.from_cuts(1000, [100]).save(tmp_path / "p.json")
    assert [str(r) for r in parse_ranges("uniform:4", 1000)[0]] == [
        "0000-0250",
        "0250-0500",
        "0500-0750",
        "0750-1000",
    ]
    assert parse_ranges("joint:4", 1000) == (Partition.uniform(1000, 1), 4)
    assert parse_ranges(str(tmp_path / "p.json"), 1000)[0].cuts == [100]
    with pytest.raises(UsageError, match="neither"):
        parse_ranges("unifrom:4", 1000)
    with pytest.raises(UsageError, match="covers 1000 timesteps, the base has 500"):
        parse_ranges(str(tmp_path / "p.json"), 500)
    (tmp_path / "bad.json").write_text("[1")
    with pytest.raises(InputError, match=r"bad\.json"):
        parse_ranges(str(tmp_path / "bad.json"), 1000)


def test_the_log_has_the_mean_error_and_that_of_each_bin(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    options = replace(FAST, train_batch_size=32, global_prob=1.0)
    train(Diffusion.load(tiny), data, tmp_path, options)
    log = [json.loads(line) for line in (tmp_path / str(SPAN) / "log.jsonl").open()]
    assert [line["step"] for line in log] == [4, 6]
    for line in log:
        assert len(line["loss_by_bin"]) == 10
        assert min(line["loss_by_bin"]) < line["loss"] < max(line["loss_by_bin"])
