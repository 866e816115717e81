"""Encoded data on disk: the values of an encoding at each step to the bit, and only those."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demerge.data import ImageData, load_images
from demerge.diffusion import encoded as room
from demerge.diffusion.encoded import Blank, EncodedData, Table
from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.finetuning import FinetuneOptions, finetune
from demerge.finetuning.batches import Batches
from demerge.finetuning.options import FinetuneInputs
from demerge.finetuning.planning import plan
from demerge.storage.checkpoint import commit_tensors
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(0, 500)
OPTIONS = FinetuneOptions(
    max_train_steps=3, train_batch_size=4, random_flip=True, caption_dropout=0.3
)


@pytest.fixture
def base(tiny_text: Path) -> Diffusion:
    return Diffusion.load(tiny_text)


@pytest.fixture
def captioned(image_folder: Path) -> ImageData:
    return load_images(image_folder, split="all", resolution=16)


def encode(base: Diffusion, data: ImageData, folder: Path, mirrors: bool = True) -> EncodedData:
    components = base.identity["components"]
    encoded = EncodedData(base, data, folder, components, batch=4, mirrors=mirrors)
    encoded.fill()
    encoded.open()
    return encoded


@pytest.mark.parametrize("by_process", [False, True])
def test_batches_are_those_of_an_encoding_at_each_step(
    base: Diffusion, captioned: ImageData, tmp_path: Path, by_process: bool
) -> None:
    encoded = encode(base, captioned, tmp_path)
    plain = Batches(base, captioned, SPAN, OPTIONS, by_process=False)
    stored = Batches(base, captioned, SPAN, OPTIONS, by_process=by_process, encoders=[encoded])
    for step in range(3):
        (a,), (b,) = plain.step(step), stored.step(step)
        assert a.condition.keys() == b.condition.keys() and a.condition
        for mine, theirs in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(mine, theirs)
    plain.close()
    stored.close()


def test_classes_are_no_text(tiny_dit: Path, tmp_path: Path) -> None:
    dit, data = Diffusion.load(tiny_dit), load_images("digits", resolution=16, channels=3, limit=9)
    options = replace(OPTIONS, random_flip=False)
    encoded = encode(dit, data, tmp_path, mirrors=False)
    assert list(encoded.tables) == ["latents"]
    (a,) = Batches(dit, data, SPAN, options).step(0)
    (b,) = Batches(dit, data, SPAN, options, encoders=[encoded]).step(0)
    for mine, theirs in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_experts_are_the_same_bits(base: Diffusion, captioned: ImageData, tmp_path: Path) -> None:
    encoded, made = encode(base, captioned, tmp_path / "cache"), []
    encoded.release()
    for name, encoders in (("a", []), ("b", [encoded])):
        for _ in finetune(base, captioned, [SPAN], OPTIONS, tmp_path / name, encoders=encoders):
            pass
        made.append(Diffusion.load(tmp_path / name / str(SPAN)).sha256)
    assert made[0] == made[1]


def test_files_are_made_once_and_again_if_they_are_wrong(
    base: Diffusion, captioned: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "FILE_BYTES", 1)  # files of one batch
    encode(base, captioned, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [file.parent.name.partition("-")[0] for file in files] == ["latents"] * 3 + ["text"] * 2
    first = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    encode(base, captioned, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in files} == {
        f: t for f, (_, t) in first.items()
    }
    one, two, three, four, five = files
    one.write_bytes(first[one][0][:-8] + b"\0" * 8)  # another value
    two.write_bytes(first[two][0][:50])
    three.unlink()
    five.write_bytes(first[four][0])  # whole, but of other rows
    tensors = load_file(four)
    record = {"format": room.FORMAT, "key": "another", "sha256": "0"}
    commit_tensors(four, tensors, record)
    encode(base, captioned, tmp_path)
    assert {file: file.read_bytes() for file in files} == {f: b for f, (b, _) in first.items()}


def test_the_key_is_what_the_values_depend_on(
    base: Diffusion, captioned: ImageData, tmp_path: Path
) -> None:
    files = base.identity["components"]

    def folders(data: ImageData = captioned, batch: int = 4, **other: str) -> dict[str, str]:
        made = EncodedData(base, data, tmp_path, files | other, batch=batch)
        return {name: table.folder.name for name, table in made.tables.items()}

    usual = folders()
    assert folders() == usual
    subset = folders(captioned.subset([0, 1]))
    assert subset["latents"] != usual["latents"] and subset["text"] != usual["text"]
    vae = folders(**{"vae/diffusion_pytorch_model.safetensors": "0"})
    assert vae["latents"] != usual["latents"] and vae["text"] == usual["text"]
    text = folders(**{"tokenizer/vocab.json": "0"})
    assert text["latents"] == usual["latents"] and text["text"] != usual["text"]
    assert not set(folders(batch=2).values()) & set(usual.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_encoding_leaves_whole_files(
    base: Diffusion, captioned: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "FILE_BYTES", 1)
    torch.set_num_threads(1)
    encode(base, captioned, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        fill = Table.is_whole
        monkeypatch.setattr(Table, "is_whole", lambda *a: time.sleep(0.05) or fill(*a))
        encode(base, captioned, tmp_path / "killed")
        os._exit(0)
    time.sleep(0.15)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    encode(base, captioned, tmp_path / "killed")
    whole, killed = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.safe*")}
        for name in ("whole", "killed")
    )
    assert whole == killed


def test_what_has_no_encoder_has_nothing_to_keep(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no autoencoder and no text encoder"):
        EncodedData(Diffusion.load(tiny), load_images("digits", limit=5), tmp_path, {}, batch=2)


def test_blank_rows_have_the_shapes_of_encoded_ones(
    base: Diffusion, captioned: ImageData, tmp_path: Path
) -> None:
    encoded, blank = encode(base, captioned, tmp_path), Blank(base)
    assert blank.x0([0, 1], [False] * 2).shape == encoded.x0([0, 1], [False] * 2).shape
    a, b = blank.text(["x"]), encoded.text(["picture 1"])
    assert a and b and {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_the_plan_says_the_size(tiny_text: Path, image_folder: Path, tmp_path: Path) -> None:
    inputs = FinetuneInputs(
        model=str(tiny_text),
        data=str(image_folder),
        out=tmp_path / "out",
        ranges="uniform:1",
        cache_latents=tmp_path / "cache",
        device="cpu",
    )
    planned = plan(inputs, replace(OPTIONS, random_flip=False))
    size = planned.document()["cache_bytes"]
    assert "MB of latents and text" in "\n".join(planned.describe())
    assert not (tmp_path / "cache").exists()
    disk = planned.cost().disk
    planned.run()
    kept = sum(
        len(t.numpy().tobytes()) for f in tmp_path.glob("cache/*/*") for t in load_file(f).values()
    )
    assert kept == size
    assert disk is not None and disk - (planned.cost().disk or 0) == size
