"""Any base or expert ends in a merge or in one DemergeError, quickly, with nothing left behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from demerge.errors import DemergeError
from demerge.lora import open_expert
from demerge.merging import merge
from demerge.storage.safetensors_header import MAX_HEADER

SECONDS = 5.0
STEM = "diffusion_pytorch_model"
TENSORS = {
    "x.weight": torch.arange(12.0).view(4, 3) / 10,
    "x.bias": torch.ones(4),
    "steps": torch.tensor([7]),
}
Write = Callable[[Path], Path]


def model(folder: Path, tensors: dict[str, Tensor] = TENSORS, **config: Any) -> Path:
    """Save a pipeline folder around a made-up denoiser."""
    unet = folder / "unet"
    unet.mkdir(parents=True)
    save_file(tensors, unet / f"{STEM}.safetensors", {"format": "pt"})
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}))
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"prediction_type": "epsilon"})
    )
    return folder


def raw(header: Any, data: bytes = b"\0" * 4, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def spec(shape: Any = (1,), offsets: Any = (0, 4), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def whole(tensors: dict[str, Tensor] = TENSORS) -> bytes:
    from safetensors.torch import save

    return save(tensors)


def with_bytes(content: bytes, name: str = f"{STEM}.safetensors") -> Write:
    """The weights of a model folder are these bytes."""

    def write(folder: Path) -> Path:
        model(folder)
        (folder / "unet" / f"{STEM}.safetensors").unlink()
        (folder / "unet" / name).write_bytes(content)
        return folder

    return write


def with_text(name: str, text: str) -> Write:
    """A file of the folder says this."""

    def write(folder: Path) -> Path:
        model(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        return folder

    return write


def with_tensors(changes: dict[str, Tensor | None], **config: Any) -> Write:
    """Some tensors are others, or missing."""

    def write(folder: Path) -> Path:
        tensors = {n: t for n, t in (TENSORS | changes).items() if t is not None}
        return model(folder, tensors, **config)

    return write


def with_index(weight_map: Any) -> Write:
    """The weights are shards by this index; a secret lies outside."""

    def write(folder: Path) -> Path:
        model(folder)
        shutil.copy(folder / "unet" / f"{STEM}.safetensors", folder.parent / "secret.safetensors")
        (folder / "unet" / f"{STEM}.safetensors").rename(folder / "unet" / "1.safetensors")
        (folder / "unet" / f"{STEM}.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        return folder

    return write


def a_link_out(folder: Path) -> Path:
    model(folder)
    outside = folder.parent / "secret.safetensors"
    (folder / "unet" / f"{STEM}.safetensors").rename(outside)
    (folder / "unet" / f"{STEM}.safetensors").symlink_to(outside)
    return folder


def a_link_in_a_circle(folder: Path) -> Path:
    model(folder)
    file = folder / "unet" / f"{STEM}.safetensors"
    file.unlink()
    file.symlink_to(file)
    return folder


def a_folder_for_weights(folder: Path) -> Path:
    model(folder)
    (folder / "unet" / f"{STEM}.safetensors").unlink()
    (folder / "unet" / f"{STEM}.safetensors").mkdir()
    return folder


class Canary:
    """A pickle that leaves a file behind when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


NAN = torch.full((4,), math.nan)
TWICE = json.dumps(spec()).encode()
GOOD = whole()
BAD: dict[str, Write] = {
    "nothing": lambda folder: folder,
    "an empty folder": lambda folder: (folder.mkdir(), folder)[1],
    "an empty file": with_bytes(b""),
    "a truncated header": with_bytes(GOOD[:40]),
    "truncated data": with_bytes(GOOD[:-5]),
    "more data": with_bytes(GOOD + b"\0" * 9),
    "an LFS pointer": with_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "a web page": with_bytes(b"<!DOCTYPE html><html><body>404</body></html>"),
    "a zip": with_bytes(b"PK\x03\x04" + b"\0" * 60),
    "a pickle for safetensors": with_bytes(pickle.dumps(Canary())),
    "a pickle": with_bytes(pickle.dumps(Canary()), f"{STEM}.bin"),
    "a header bomb": with_bytes(raw(b"{}", length=MAX_HEADER + 1)),
    "a header of 2^64": with_bytes(raw(b"{}", length=2**64 - 1)),
    "nested brackets": with_bytes(raw(b'{"a":' + b"[" * 100_000)),
    "a long number": with_bytes(raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 50_000 + b'],"data_offsets":[0,4]}}')),
    "a duplicate key": with_bytes(raw(b'{"a":%b,"a":%b}' % (TWICE, TWICE))),
    "an overlap": with_bytes(raw({"a": spec((2,), (0, 8)), "b": spec((1,), (4, 8))}, b"\0" * 8)),
    "a hole": with_bytes(raw({"a": spec(), "b": spec((1,), (8, 12))}, b"\0" * 12)),
    "a shape of 2^80": with_bytes(raw({"a": spec((2**40, 2**40), (0, 4))})),
    "no tensors": with_bytes(raw({}, b"")),
    "an index that leads out": with_index(dict.fromkeys(TENSORS, "../../secret.safetensors")),
    "an index of a path": with_index(dict.fromkeys(TENSORS, "/etc/passwd")),
    "an index of no file": with_index(dict.fromkeys(TENSORS, "2.safetensors")),
    "an index of nothing": with_index({}),
    "an index of numbers": with_index({"x.weight": 5}),
    "a link out": a_link_out,
    "a link in a circle": a_link_in_a_circle,
    "a folder for weights": a_folder_for_weights,
    "model_index is a list": with_text("model_index.json", "[]"),
    "model_index of no component": with_text("model_index.json", '{"unet": null, "transformer": 5, "vae": []}'),
    "model_index is half": with_text("model_index.json", '{"unet": ["diff'),
    "a class of another architecture": with_tensors({}, _class_name="FluxTransformer2DModel"),
    "a class that is a list": with_tensors({}, _class_name=["UNet2DModel"]),
    "config is no JSON": with_text("unet/config.json", "{"),
    "another scheduler": with_text("scheduler/scheduler_config.json", '{"prediction_type": "v_prediction"}'),
    **{
        f"a schedule {text}": with_text("scheduler/scheduler_config.json", text)
        for text in (
            '{"num_train_timesteps": 1e400}',
            '{"num_train_timesteps": -1}',
            '{"trained_betas": [[1], [2, 3]]}',
            '{"trained_betas": {"x": 1e400}}',
            '{"beta_schedule": "linear", "beta_start": "x"}',
            '{"beta_schedule": "linear", "beta_start": 1e400, "beta_end": null}',
        )
    },
    "a record without a range": with_text("expert.json", '{"range": 5}'),
    "a record with a range of text": with_text("expert.json", '{"range": ["a", null]}'),
    "a range too large": with_text("expert.json", '{"range": [0, 1e400]}'),
    "another base": with_text("expert.json", '{"range": [0, 9], "base_sha256": "00"}'),
    "a tensor less": with_tensors({"x.bias": None}),
    "a tensor more": with_tensors({"y": torch.ones(1)}),
    "another shape": with_tensors({"x.bias": torch.ones(5)}),
    "other integers": with_tensors({"steps": torch.tensor([8])}),
    "integers for floats": with_tensors({"x.bias": torch.ones(4, dtype=torch.int64)}),
    "NaN": with_tensors({"x.bias": NAN}),
    "infinity": with_tensors({"x.bias": torch.full((4,), math.inf)}),
    "float64 that overflows": with_tensors({"x.bias": torch.full((4,), 1e308, dtype=torch.float64)}),
    "8 bit floats of NaN": with_tensors({"x.bias": NAN.to(torch.float8_e4m3fn)}),
    "a LoRA of nothing": with_tensors(dict.fromkeys(TENSORS) | {"lora_unet_y.lora_down.weight": torch.ones(1, 3)}),
    "two denoisers without a boundary": with_text("model_index.json", '{"transformer": [], "transformer_2": [1]}'),
}  # fmt: skip
HARMLESS = ("a class that is a list", "model_index of no component", "a schedule")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return model(tmp_path / "base")


def attempt(base: Path, experts: list[Path], method: str = "ties") -> DemergeError | None:
    """Merge; other errors, taking long and leaving half an output fail the test."""
    out, before = Path("out"), time.monotonic()
    try:
        merge(base, experts, out, method=method, weights=[1.0] * len(experts), num_workers=1)
    except DemergeError as error:
        assert not list(Path().glob("*out*")), "an error left something behind"
        assert error.what and len(error.what) < 2000
        return error
    finally:
        assert time.monotonic() - before < SECONDS
    assert out.is_dir()
    shutil.rmtree(out)
    return None


@pytest.mark.parametrize("name", BAD)
def test_bad_experts_are_refused(base: Path, name: str) -> None:
    error = attempt(base, [BAD[name](base.parent / "bad")])
    assert error is not None or name.startswith(HARMLESS)
    assert not Path("canary").exists()


@pytest.mark.parametrize("write", BAD.values(), ids=BAD)
def test_bad_bases_are_refused_or_merged(base: Path, write: Write) -> None:
    attempt(write(base.parent / "bad"), [base], "average")
    assert not Path("canary").exists()


def flip(content: bytes, chance: random.Random) -> bytes:
    position = chance.randrange(len(content))
    return content[:position] + bytes([chance.randrange(256)]) + content[position + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def double(content: bytes, chance: random.Random) -> bytes:
    start, stop = sorted(chance.randrange(len(content)) for _ in range(2))
    return content[:stop] + content[start:]


def swap_digit(content: bytes, chance: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(content[:400]) if chr(byte).isdigit()]
    position = chance.choice(digits)
    return content[:position] + str(chance.randrange(10)).encode() + content[position + 1 :]


ADAPTER = {
    "unet.x.lora_A.weight": torch.ones(2, 3),
    "unet.x.lora_B.weight": torch.ones(4, 2),
    "unet.x.alpha": torch.tensor(1.0),
}


@pytest.mark.parametrize("tensors", [TENSORS, ADAPTER], ids=["model", "adapter"])
def test_changed_bytes_are_merged_or_refused(base: Path, tensors: dict[str, Tensor]) -> None:
    good, file, chance = whole(tensors), base.parent / "expert.safetensors", random.Random(0)
    refused = 0
    for mutate in (flip, cut, double, swap_digit) * 25:
        file.write_bytes(mutate(good, chance))
        refused += attempt(base, [file], "average") is not None
    assert 50 <= refused < 100
    file.write_bytes(good)
    assert attempt(base, [file], "average") is None


SETTINGS: list[Any] = [
    None,
    1,
    -1,
    1e400,
    "x",
    [],
    {},
    True,
    {"x": "y"},
    {"(a+)+$": 1},
    {"x": None},
    "\x00",
    2**80,
    [[[]]],
]


def test_any_configuration_of_an_adapter_is_read_or_refused(base: Path) -> None:
    folder = base.parent / "adapter"
    folder.mkdir()
    save_file(ADAPTER, folder / "adapter_model.safetensors")
    names = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "peft_type",
        "init_lora_weights",
        "bias",
    )
    for name in names:
        for value in SETTINGS:
            (folder / "adapter_config.json").write_text(json.dumps({name: value}))
            with contextlib.suppress(DemergeError):
                assert open_expert(folder, TENSORS)["x.weight"].shape == (4, 3)
    for text in ("", "[]", "{", '{"r": 1, "r": 2}', "[" * 10_000):
        (folder / "adapter_config.json").write_text(text)
        assert attempt(base, [folder], "average") is not None
