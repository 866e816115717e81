"""Training some layers only: what trains, what stays to the bit, what is kept of it, and which choices are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from demerge.conflict import layers_of
from demerge.data import ImageData
from demerge.diffusion.model import Diffusion
from demerge.errors import InputError, Preempted, UsageError
from demerge.finetuning import FinetuneOptions, finetune
from demerge.finetuning.checkpoint import newest_state
from demerge.finetuning.layers import hash_layers, load_layers, trained_parameters
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.storage.checkpoint import Checkpoint
from demerge.timesteps import TimestepRange

FAST = FinetuneOptions(
    max_train_steps=4, train_batch_size=4, checkpointing_steps=2, learning_rate=1e-2, use_ema=False
)
SPAN = TimestepRange(0, 500)
RESNET = "down_blocks.1.resnets.0"
SOME = ("mid_block.attentions.0.to_out.0", f"{RESNET}.conv2", f"{RESNET}.norm1", "conv_out")


def train(
    base: Diffusion,
    data: ImageData,
    out: Path,
    layers: Sequence[str] | None = SOME,
    stop_at: int | None = None,
    **changes: Any,
) -> Path:
    steps = itertools.count(1)
    for _ in finetune(
        base,
        data,
        [SPAN],
        replace(FAST, **changes),
        out,
        layers=layers,
        stop=lambda: next(steps) == stop_at,
    ):
        pass
    return out / str(SPAN)


def changed(base: Path, expert: Path) -> set[str]:
    """The layers of which a tensor on disk differs from the base's."""
    one, other = (Checkpoint.open(folder) for folder in (base, expert))
    assert list(one) == list(other)
    return set(layers_of({name: 1 for name in one if not torch.equal(one[name], other[name])}))


@pytest.mark.parametrize("projection", ["foldable", "none"])
@pytest.mark.parametrize("use_ema", [True, False])
def test_only_the_chosen_layers_change(
    tiny: Path, data: ImageData, tmp_path: Path, projection: str, use_ema: bool
) -> None:
    expert = train(Diffusion.load(tiny), data, tmp_path, projection=projection, use_ema=use_ema)
    assert changed(tiny, expert) == set(SOME)
    assert type(diffusers.DiffusionPipeline.from_pretrained(expert)) is diffusers.DDPMPipeline
    record = json.loads((expert / "expert.json").read_text())
    assert record["train_layers"] == list(SOME) and record["inputs"][
        "layers_sha256"
    ] == hash_layers(reversed(SOME))


@pytest.mark.parametrize(
    "layer", ["mid_block.resnets.0.norm1", "up_blocks.0.resnets.0.norm2", "conv_out"]
)
def test_a_layer_trains_alone(tiny: Path, data: ImageData, tmp_path: Path, layer: str) -> None:
    """torch 2.13 crashes on some group norms whose input asks for no gradient; an end of the process would be seen here."""
    base = Diffusion.load(tiny)
    run = ExpertTraining(Job(base, data, FAST, {}, [layer]), SPAN, tmp_path)
    assert run.take_step() < 100
    moved = {
        name
        for name, p in run.averaged_denoiser().named_parameters()
        if not torch.equal(p, base.denoiser.get_parameter(name))
    }
    assert set(layers_of(dict.fromkeys(moved, 1))) == {layer}


def test_optimizer_average_and_checkpoint_hold_what_trains(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny)
    run = ExpertTraining(
        Job(base, data, replace(FAST, projection="none"), {}, SOME), SPAN, tmp_path
    )
    run.take_step()
    run.save_checkpoint()
    chosen = {
        name for name, _ in base.denoiser.named_parameters() if name.rpartition(".")[0] in SOME
    }
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert (
        sum(p.numel() for p in held)
        == trained_parameters(base.denoiser, SOME)
        < base.parameters / 5
    )
    assert {id(p) for p in run.optimizer.state} == {id(p) for p in held}
    assert set(run.one_step.ema) == set(run.parameters) == chosen
    state = newest_state(tmp_path)
    assert state is not None
    kept = {
        key.split(".", 1 if key[0] != "o" else 2)[-1]
        for key in state.tensors()
        if key.startswith(("model.", "ema.", "optimizer."))
    }
    assert kept == chosen
    assert all(p.grad is None for p in run.denoiser.parameters())


def test_w_is_put_behind_sites_that_train_as_a_whole(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny)

    def mixes(*layers: str) -> int:
        run = ExpertTraining(
            Job(base, data, FAST, {}, layers), SPAN, tmp_path / hash_layers(layers)[:8]
        )
        return sum(name.endswith(".W") for name in run.parameters)

    assert mixes("mid_block.attentions.0.to_out.0") == 1
    assert mixes(f"{RESNET}.conv2") == mixes(f"{RESNET}.conv_shortcut") == 0
    assert mixes(f"{RESNET}.conv2", f"{RESNET}.conv_shortcut") == 1


def test_all_layers_by_name_equal_no_choice(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    everything = list(layers_of({name: 1 for name, _ in base.denoiser.named_parameters()}))
    named, plain = (
        train(base, data, tmp_path / "named", everything),
        train(base, data, tmp_path / "plain", None),
    )
    assert Diffusion.load(named).sha256 == Diffusion.load(plain).sha256
    assert json.loads((plain / "expert.json").read_text())["train_layers"] is None


def test_resumed_run_equals_the_uninterrupted_one(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    base = Diffusion.load(tiny)
    whole = train(base, data, tmp_path / "whole", use_ema=True)
    with pytest.raises(Preempted):
        train(base, data, tmp_path / "cut", stop_at=3, use_ema=True)
    for layers in (None, SOME[:2]):
        with pytest.raises(UsageError, match="layers_sha256"):
            train(base, data, tmp_path / "cut", layers, use_ema=True)
    again = train(base, data, tmp_path / "cut", SOME[::-1], use_ema=True)
    assert Diffusion.load(again).sha256 == Diffusion.load(whole).sha256
    with pytest.raises(UsageError, match="layers_sha256"):
        train(base, data, tmp_path / "cut", None, use_ema=True)


def test_unknown_layers_are_named(tiny: Path, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no layer head, neck, tail and 1 more"):
        train(Diffusion.load(tiny), data, tmp_path, ["conv_out", "neck", "tail", "head", "toe"])
    assert list(tmp_path.iterdir()) == []


def written(path: Path, base: Diffusion, **changes: Any) -> Path:
    document = {
        "format": "demerge.layers/1",
        "model": base.sha256,
        "ranges": [[0, 500], [500, 1000]],
        "train": ["conv_out"],
    }
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_a_choice_is_read(tiny: Path, tmp_path: Path) -> None:
    base = Diffusion.load(tiny)
    names, ranges = load_layers(written(tmp_path / "l.json", base), base)
    assert (names, ranges) == (("conv_out",), (TimestepRange(0, 500), TimestepRange(500, 1000)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "demerge.layers/2"}, "format: must be"),
        ({"train": []}, "train: .* at least 1 item"),
        ({"train": "conv_out"}, "train: must be a valid array"),
        ({"train": [["conv_out"]]}, r"train\[0\]: must be a valid string"),
        ({"train": ["conv_out", "nowhere"]}, "no layer nowhere"),
        ({"model": "0" * 64}, "sha256 0000000000000000"),
        ({"model": None}, "model: must be a valid string, found null"),
        ({"trian": ["conv_out"]}, "unknown key 'trian'"),
        ({"ranges": None}, "ranges: must be a valid array"),
        ({"ranges": [[500, 0]]}, r"ranges\[0\]: must be \[start, stop\]"),
        ({"ranges": [[0]]}, r"missing in ranges\[0\]"),
    ],
)
def test_other_files_are_refused(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = Diffusion.load(tiny)
    with pytest.raises(InputError, match=message) as refused:
        load_layers(written(tmp_path / "l.json", base, **changes), base)
    assert "l.json" in str(refused.value) and refused.value.fix


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_broken_files_are_refused(tiny: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "l.json").write_text(content)
    with pytest.raises(InputError, match=r"l\.json"):
        load_layers(tmp_path / "l.json", Diffusion.load(tiny))
