"""Checked safetensors: what is read is what was written, and what is damaged or hostile is refused in one sentence."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demerge.errors import InputError
from demerge.storage.checkpoint import Checkpoint, commit_tensors, content_sha256, locate
from demerge.storage.safetensors_header import MAX_HEADER, read_header

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def spec(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {str(d): (torch.arange(6).view(2, 3) % 2).to(d) for d in DTYPES} | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }


def test_reads_what_was_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint[name].dtype == tensor.dtype and checkpoint[name].shape == tensor.shape
        assert torch.equal(checkpoint[name].double(), tensor.double())


def test_reads_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    header = {"a": spec("U8", (1,), (0, 1)), "b": spec("F32", (2,), (1, 9))}
    (tmp_path / "a.safetensors").write_bytes(raw(header, b"\x07" + struct.pack("<ff", 1.5, -2)))
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert checkpoint["b"].tolist() == [1.5, -2]


def test_commit_tensors_is_read_by_safetensors(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = commit_tensors(tmp_path / "a.safetensors", tensors, {"key": "value"})
    assert set(load_file(path)) == set(tensors)
    assert read_header(path).metadata == {"key": "value"}


# -- the hash ---------------------------------------------------------------------------------------------------------


def test_hash_is_of_the_content(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).half(), "b": torch.arange(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    hashes = {
        content_sha256(tensors),
        content_sha256(dict(reversed(tensors.items()))),
        content_sha256({"a": tensors["a"].float(), "b": tensors["b"]}),
        content_sha256(Checkpoint.open(tmp_path / "a.safetensors")),
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3)},
        {"a": torch.ones(3, 2)},
        {"b": torch.ones(2, 3)},
        {"a": torch.ones(2, 3), "b": torch.empty(0)},
        {"a": torch.ones(2, 3, dtype=torch.int64)},
    ],
)
def test_hash_tells_contents_apart(other: dict[str, torch.Tensor]) -> None:
    assert content_sha256(other) != content_sha256({"a": torch.ones(2, 3)})


def test_hash_is_that_of_the_loaded_model(tiny: Path) -> None:
    from demerge.diffusion.model import Diffusion

    assert Diffusion.load(tiny).sha256 == content_sha256(Checkpoint.open(tiny))


# -- places -----------------------------------------------------------------------------------------------------------


def save_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_finds_files_folders_pipelines_shards_and_variants(tmp_path: Path, tiny: Path) -> None:
    file = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    hashes = {content_sha256(Checkpoint.open(p)) for p in (tiny, tiny / "unet", file)}
    tensors = load_file(file)
    half = len(tensors) // 2
    names = list(tensors)
    shards = {
        "1.safetensors": {n: tensors[n] for n in names[:half]},
        "2.safetensors": {n: tensors[n] for n in names[half:]},
    }
    index = save_shards(tmp_path / "shards", shards)
    hashes |= {content_sha256(Checkpoint.open(p)) for p in (index, index.parent)}
    (tmp_path / "variant").mkdir()
    save_file(tensors, tmp_path / "variant" / "diffusion_pytorch_model.fp16.safetensors")
    save_file(tensors, tmp_path / "variant" / "fisher.safetensors")
    hashes.add(content_sha256(Checkpoint.open(tmp_path / "variant")))
    assert len(hashes) == 1


STEM = "diffusion_pytorch_model"


def save_variants(folder: Path, variants: dict[str, float]) -> Path:
    """Save a tensor `a` of one value for each variant, "" for the plain one."""
    folder.mkdir(parents=True, exist_ok=True)
    for variant, value in variants.items():
        name = f"{STEM}.{variant}.safetensors" if variant else f"{STEM}.safetensors"
        save_file({"a": torch.tensor([value])}, folder / name)
    return folder


@pytest.mark.parametrize(
    ("variants", "asked", "value"),
    [
        ({"": 1, "fp16": 2}, None, 1),
        ({"": 1, "fp16": 2}, "fp16", 2),
        ({"fp16": 2}, None, 2),
        ({"fp16": 2, "bf16": 3}, "bf16", 3),
        ({"": 1}, "fp16", 1),
        ({"non_ema": 4, "fp16": 2, "": 1}, "non_ema", 4),
    ],
)
def test_takes_the_variant_asked_for_or_the_only_kind(
    tmp_path: Path, variants: dict[str, float], asked: str | None, value: float
) -> None:
    folder = save_variants(tmp_path / "unet", variants)
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    for path in (tmp_path, folder):
        assert Checkpoint.open(path, asked)["a"].tolist() == [value]


@pytest.mark.parametrize(
    ("variants", "asked"), [({"fp16": 2, "bf16": 3}, None), ({"": 1, "fp16": 2}, "bf16")]
)
def test_asks_which_variant(tmp_path: Path, variants: dict[str, float], asked: str | None) -> None:
    with pytest.raises(InputError, match="fp16") as caught:
        Checkpoint.open(save_variants(tmp_path, variants), asked)
    assert "--variant" in caught.value.fix


@pytest.mark.parametrize("index", ["safetensors.index.fp16.json", "fp16.safetensors.index.json"])
def test_finds_the_shards_of_a_variant(tmp_path: Path, index: str) -> None:
    shards = {f"{STEM}.fp16-0000{i}-of-00002.safetensors": {str(i): torch.ones(1)} for i in (1, 2)}
    plain = save_shards(tmp_path, shards)
    plain.rename(tmp_path / f"{STEM}.{index}")
    for path, variant in (
        (tmp_path, None),
        (tmp_path, "fp16"),
        (tmp_path / f"{STEM}.{index}", None),
    ):
        assert set(Checkpoint.open(path, variant)) == {"1", "2"}
    save_file({"1": torch.zeros(1)}, tmp_path / f"{STEM}.safetensors")
    assert set(Checkpoint.open(tmp_path)) == {"1"}
    assert set(Checkpoint.open(tmp_path, "fp16")) == {"1", "2"}


def test_shards_go_before_a_file_as_in_diffusers(tmp_path: Path) -> None:
    save_shards(tmp_path, {f"{STEM}-00001-of-00001.safetensors": {"shard": torch.ones(1)}})
    save_file({"file": torch.ones(1)}, tmp_path / f"{STEM}.safetensors")
    assert set(Checkpoint.open(tmp_path)) == {"shard"}


def test_a_component_that_is_a_link_out_of_its_pipeline_is_refused(tmp_path: Path) -> None:
    save_variants(tmp_path / "secret", {"": 1})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leads out"):
        locate(tmp_path / "model")


# -- old names of attention -------------------------------------------------------------------------------------------

OLD = {
    "mid.attentions.0.query.weight": 0,
    "mid.attentions.0.value.bias": 1,
    "mid.attentions.0.proj_attn.weight": 2,
}
NEW = {
    "mid.attentions.0.to_q.weight": 0,
    "mid.attentions.0.to_v.bias": 1,
    "mid.attentions.0.to_out.0.weight": 2,
}


def test_both_manners_of_naming_attention_are_one_model(tmp_path: Path) -> None:
    models = [
        {n: torch.full((2,), float(i)) for n, i in names.items()} | {"key": torch.ones(1)}
        for names in (OLD, NEW)
    ]
    for base in models:
        for other in models:
            save_file(other, tmp_path / "a.safetensors")
            named = Checkpoint.open(tmp_path / "a.safetensors").named_like(base)
            assert set(named) == set(base) and all(torch.equal(named[n], base[n]) for n in base)
    assert content_sha256(models[0]) == content_sha256(models[1])


def test_names_that_fit_in_no_manner_stay(tmp_path: Path) -> None:
    save_file(
        {"x.to_q.weight": torch.ones(1), "x.query.weight": torch.ones(1)},
        tmp_path / "a.safetensors",
    )
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert checkpoint.named_like({"x.query.weight": 1}) is checkpoint
    assert checkpoint.named_like({"other": 1}) is checkpoint


def test_refuses_a_folder_without_weights_and_one_with_pickles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.safetensors weights"):
        locate(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match="pickled"):
        locate(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        locate(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors", ""],
)
def test_refuses_a_weight_map_that_leads_out(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    index = save_shards(folder, {"1.safetensors": {"a": torch.ones(1)}})
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="leads out"):
        Checkpoint.open(folder)


def test_refuses_a_link_that_leads_out_but_for_the_hub_cache(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(InputError, match="leads out"):
        Checkpoint.open(folder)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "models--a--b" / "blobs" / "x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/x")
    assert Checkpoint.open(snapshot)["a"].tolist() == [1]


def test_refuses_shards_that_disagree_with_their_index(tmp_path: Path) -> None:
    one = {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}}
    index = save_shards(tmp_path, one)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}))
    with pytest.raises(InputError, match="not in the shard"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, tmp_path / "1.safetensors")
    with pytest.raises(InputError, match="in no index"):
        Checkpoint.open(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "2.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}))
    with pytest.raises(InputError, match=r"is in 1.safetensors too"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": ["1.safetensors"]}))
    with pytest.raises(InputError, match="weight_map"):
        Checkpoint.open(tmp_path)


# -- bad files --------------------------------------------------------------------------------------------------------

FOUR = b"\0" * 4
BAD: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "html after white space": b"\n\n<HTML><body>denied</body>",
    "pickle": b"\x80\x02}q\x00.",
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "gguf": b"GGUF" + b"\0" * 60,
    "text": b"hello, these are no weights at all",
    "header larger than the file": raw({"a": spec()}, FOUR, length=10_000),
    "header bomb": raw(b"{}", length=MAX_HEADER + 1),
    "header of 2^64": raw(b"{}", length=2**64 - 1),
    "no json": raw(b"{'a': 1}", FOUR),
    "no utf-8": raw(b'{"\xff": 1}', FOUR),
    "json too deep": raw(b'{"a":' + b"[" * 100_000, FOUR),
    "a list": raw([1, 2], FOUR),
    "duplicate tensor": raw(b'{"a":%b,"a":%b}' % ((json.dumps(spec()).encode(),) * 2), FOUR),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": spec()}, FOUR),
    "unknown dtype": raw({"a": spec("F4")}, FOUR),
    "no dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR),
    "spec is a number": raw({"a": 4}, FOUR),
    "negative shape": raw({"a": spec(shape=(-1, -1))}, FOUR),
    "shape of floats": raw({"a": spec(shape=(1.0,))}, FOUR),
    "shape of booleans": raw({"a": spec(shape=(True,))}, FOUR),
    "shape too large": raw({"a": spec(shape=(2**40, 2**40, 0), offsets=(0, 0))}),
    "too many dimensions": raw({"a": spec(shape=(1,) * 1000)}, FOUR),
    "shape and bytes disagree": raw({"a": spec(shape=(2,))}, FOUR),
    "offsets backwards": raw({"a": spec(shape=(0,), offsets=(4, 0))}, FOUR),
    "three offsets": raw({"a": spec(offsets=(0, 4, 8))}, FOUR),
    "overlap": raw({"a": spec(shape=(2,), offsets=(0, 8)), "b": spec(offsets=(4, 8))}, FOUR * 2),
    "hole": raw({"a": spec(), "b": spec(offsets=(8, 12))}, FOUR * 3),
    "truncated data": raw({"a": spec(shape=(2,), offsets=(0, 8))}, FOUR),
    "trailing data": raw({"a": spec()}, FOUR * 2),
    "too many tensors": raw({f"{i}": spec(shape=(0,), offsets=(0, 0)) for i in range(65_537)}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_refuses_bad_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(path)
    assert "bad.safetensors" in caught.value.what and caught.value.fix


def test_refuses_a_zipped_pickle_and_a_folder_named_like_a_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    with pytest.raises(InputError, match="zip"):
        Checkpoint.open(tmp_path / "model.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError):
        Checkpoint.open(tmp_path / "folder.safetensors")


def test_any_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 2), "b": torch.arange(4)}, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    path, chance = tmp_path / "bad.safetensors", random.Random(0)
    for mutate in (flip, cut) * 150:
        path.write_bytes(mutate(good, chance))
        try:
            checkpoint = Checkpoint.open(path)
            assert sum(t.numel() for t in checkpoint.values()) <= len(good)
        except InputError:
            pass


def flip(content: bytes, chance: random.Random) -> bytes:
    position = chance.randrange(len(content))
    return content[:position] + bytes([chance.randrange(256)]) + content[position + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def test_headers_are_read_without_torch(tiny: Path) -> None:
    code = f"""
import sys
from demerge.inspection import inspect_model
facts = inspect_model({str(tiny)!r})
assert facts.model_class == "UNet2DModel" and facts.prediction_type == "epsilon" and facts.mergeable, facts
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
