"""Pickles are opened on request alone, for their tensors alone; nothing in them runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.pickles import convert

WEIGHTS = {
    "a.weight": torch.arange(6.0).view(2, 3).half(),
    "a.steps": torch.tensor(3),
    "b": torch.empty(0, 2),
}


class Canary:
    """A pickle that touches a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [lambda t: t, lambda t: {"state_dict": t, "epoch": 3, "loss": [0.5]}],
    ids=["plain", "nested"],
)
def test_writes_the_tensors(source: Path, zipped: bool, wrap: Any) -> None:
    torch.save(wrap(WEIGHTS), source, _use_new_zipfile_serialization=zipped)
    out = source.with_suffix(".safetensors")
    convert(source, out, allow_pickle=True)
    assert same(load_file(out), WEIGHTS)
    assert same(dict(Checkpoint.open(out)), WEIGHTS)


def test_tensors_that_share_memory_or_lie_across_it_are_written_whole(source: Path) -> None:
    weight = torch.randn(3, 4)
    tied = {"a": weight, "b": weight, "c": weight.T, "d": weight[1:]}
    torch.save(tied, source)
    convert(source, source.with_suffix(".safetensors"), allow_pickle=True)
    assert same(load_file(source.with_suffix(".safetensors")), tied)


def test_asks_before_it_opens_a_pickle(source: Path) -> None:
    torch.save(WEIGHTS, source)
    with pytest.raises(UsageError, match="may run code"):
        convert(source, source.with_suffix(".safetensors"))
    with pytest.raises(UsageError, match="does not end in"):
        convert(source, source.with_suffix(".out"), allow_pickle=True)


def test_several_tables_want_a_key(source: Path) -> None:
    torch.save({"model": WEIGHTS, "ema": {"a": torch.ones(2)}}, source)
    out = source.with_suffix(".safetensors")
    for key, words in (
        (None, "several tables of tensors: model, ema"),
        ("best", "no table of tensors 'best'"),
    ):
        with pytest.raises(InputError, match=words):
            convert(source, out, allow_pickle=True, key=key)
    convert(source, out, allow_pickle=True, key="ema")
    assert same(load_file(out), {"a": torch.ones(2)})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(source: Path, zipped: bool) -> None:
    canary = source.parent / "canary"
    torch.save({**WEIGHTS, "x": Canary(canary)}, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="more than tensors"):
        convert(source, source.with_suffix(".safetensors"), allow_pickle=True)
    source.write_bytes(pickle.dumps(Canary(canary), protocol=2))
    with pytest.raises(InputError):
        convert(source, source.with_suffix(".safetensors"), allow_pickle=True)
    assert [p.name for p in source.parent.iterdir()] == ["model.bin"]


def stretched() -> Tensor:
    return torch.ones(1).expand(1 << 40)


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.ones(2, 2).to_sparse()},
        {1: torch.ones(2)},
        {"a": stretched()},
        {"a": 3},
        [torch.ones(2)],
        torch.ones(2),
        {},
    ],
    ids=[
        "complex",
        "sparse",
        "number for a name",
        "stretched",
        "no tensor",
        "list",
        "tensor",
        "empty",
    ],
)
def test_refuses_what_safetensors_does_not_hold(source: Path, content: Any) -> None:
    torch.save(content, source)
    with pytest.raises(InputError, match=r"model\.bin"):
        convert(source, source.with_suffix(".safetensors"), allow_pickle=True)


def test_refuses_damaged_files(source: Path) -> None:
    torch.save(WEIGHTS, source)
    whole = source.read_bytes()
    for content in (
        b"",
        b"hello",
        whole[: len(whole) // 2],
        whole[:-30],
        b"\x80\x02}q\x00.",
        b"<html>",
        b"PK\x03\x04" + b"\0" * 99,
    ):
        source.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.bin"):
            convert(source, source.with_suffix(".safetensors"), allow_pickle=True)
    with pytest.raises(InputError, match="no such file"):
        convert(
            source.parent / "nothing.bin", source.with_suffix(".safetensors"), allow_pickle=True
        )


def test_refuses_an_archive_that_unpacks_to_more(source: Path) -> None:
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/0", b"\0" * 1_000_000)
    with pytest.raises(InputError, match="unpacks to"):
        convert(source, source.with_suffix(".safetensors"), allow_pickle=True)


def test_keeps_what_is_there(source: Path) -> None:
    torch.save(WEIGHTS, source)
    out = source.with_suffix(".safetensors")
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        convert(source, out, allow_pickle=True)
    assert out.read_bytes() == b"mine"
