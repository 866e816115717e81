"""The conflict map as a value and as a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from demerge.conflict import ConflictMap, Origin
from demerge.errors import InputError
from demerge.timesteps import Partition

ORIGIN = Origin("m", "d", 10, "exact", "shared", False, "euclid", 4, 0)


def make(N: int = 4, M: int = 5, T: int = 20) -> ConflictMap:
    s = np.random.default_rng(0).standard_normal((N * M, 7))
    return ConflictMap(
        Partition.uniform(T, N), (s @ s.T).reshape(N, M, N, M), np.linspace(5, -5, T), ORIGIN
    )


def test_save_and_load_give_the_same_value_and_bytes(tmp_path: Path) -> None:
    map = make()
    first, second = map.save(tmp_path / "a"), ConflictMap.load(tmp_path / "a").save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    loaded = ConflictMap.load(second)
    assert (loaded.bins, loaded.origin, loaded.edges) == (map.bins, map.origin, [0, 5, 10, 15, 20])
    assert np.array_equal(loaded.gram, map.gram) and np.array_equal(loaded.log_snr, map.log_snr)
    assert loaded.timesteps.tolist() == [2, 7, 12, 17] and loaded.widths.sum() == 1


def test_a_map_shows_itself() -> None:
    """A short text, a tidy table, a figure; what makes them is found when it is asked for."""
    assert repr(make()) == "ConflictMap(4 bins of [0, 20), 5 groups of 4, shared draws, exact)"
    steady = np.eye(4, 7)[:, None] + 0.05 * np.random.default_rng(0).standard_normal((4, 5, 7))
    steady[3] = np.random.default_rng(1).standard_normal((5, 7))
    map = replace(make(), gram=np.einsum("imd,jnd->imjn", steady, steady))
    table = map.to_frame()
    assert table.columns.tolist() == [
        "bin_i",
        "bin_j",
        "t_i",
        "t_j",
        "cosine",
        "se",
        "resolved",
        "weak",
    ]
    assert len(table) == 16 and table.resolved.sum() == 9 and not table.weak.any()
    row = table[(table.bin_i == 0) & (table.bin_j == 2)].iloc[0]
    assert (row.t_i, row.t_j) == (2, 12) and abs(row.cosine) < 5 * row.se < 0.5
    unresolved = table[~table.resolved]
    assert (
        unresolved.cosine.isna().all() and unresolved.se.isna().all() and 3 in set(unresolved.bin_i)
    )
    square = table.pivot(index="bin_i", columns="bin_j", values="cosine").to_numpy()
    assert square.diagonal()[:3] == pytest.approx(1) and square[0, 2] == row.cosine
    figure = map.plot(Partition.from_cuts(20, [10]))
    assert figure.axes[0].get_xlim() == (0, 20) and len(map.plot().axes[0].lines) + 2 == len(
        figure.axes[0].lines
    )


def test_the_map_cannot_be_written_to_and_leaves_its_arguments_alone() -> None:
    gram = make().gram.copy()
    map = replace(make(), gram=gram)
    with pytest.raises(ValueError, match="read-only"):
        map.gram[0, 0, 0, 0] = 1
    gram[0] = 0


def _changed(map: ConflictMap, **changes: Any) -> Callable[[Path], object]:
    """Write a file as `save` does, but with some of its parts replaced."""
    origin = {"model": "m", "data": "d", "parameters": 10, "engine": "exact", "draws": "shared"}
    origin |= {"antithetic": False, "metric": "euclid", "batch_size": 4, "seed": 0}
    header = {
        "format": "demerge.conflict/1",
        "edges": map.edges,
        "origin": origin,
        **changes.get("header", {}),
    }
    tensors = {"gram": map.gram.copy(), "log_snr": map.log_snr.copy(), **changes.get("tensors", {})}
    data = safetensors.numpy.save(
        tensors, metadata={"demerge": changes.get("text", json.dumps(header))}
    )
    return lambda path: path.write_bytes(data)


MAP = make()
BAD = np.where(np.arange(400).reshape(4, 5, 4, 5) == 7, np.nan, MAP.gram)
FILES = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256))),
    "a giant header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
    "cut short": lambda path: path.write_bytes(MAP.save(path).read_bytes()[:-9]),
    "another format": _changed(MAP, header={"format": "demerge.expert/1"}),
    "no header": _changed(MAP, text="null"),
    "no JSON": _changed(MAP, text="{"),
    "deep JSON": _changed(MAP, text="[" * 100_000),
    "edges that fall": _changed(MAP, header={"edges": [0, 10, 5, 15, 20]}),
    "edges of text": _changed(MAP, header={"edges": [0, "5", 10, 15, 20]}),
    "too few edges": _changed(MAP, header={"edges": [0, 10, 20]}),
    "endless timesteps": _changed(MAP, header={"edges": [0, 10**18]}),
    "an origin of too little": _changed(MAP, header={"origin": {"model": "m"}}),
    "an origin of wrong type": _changed(
        MAP, header={"origin": {**dict.fromkeys(Origin.__slots__, "x")}}
    ),
    "another tensor": _changed(MAP, tensors={"more": np.zeros(3)}),
    "not finite": _changed(MAP, tensors={"gram": BAD}),
    "not symmetric": _changed(
        MAP, tensors={"gram": MAP.gram * np.linspace(0.5, 1, 20).reshape(4, 5, 1, 1)}
    ),
    "a negative square": _changed(MAP, tensors={"gram": -MAP.gram}),
    "no Gram matrix": _changed(
        MAP, tensors={"gram": np.ones((4, 5, 4, 5)) + 9 * (1 - np.eye(20)).reshape(4, 5, 4, 5)}
    ),
    "half precision": _changed(MAP, tensors={"gram": MAP.gram.astype(np.float32)}),
    "two dimensions": _changed(MAP, tensors={"gram": MAP.gram.reshape(20, 20)}),
    "too few groups": _changed(MAP, tensors={"gram": MAP.gram[:, :4, :, :4]}),
    "another T": _changed(MAP, tensors={"log_snr": np.zeros(21)}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_an_input_error_that_names_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "conflict.safetensors"
    FILES[name](path)
    with pytest.raises(InputError, match=r"conflict\.safetensors: not a conflict map") as error:
        ConflictMap.load(path)
    assert error.value.fix
    assert not re.search(r"\w+Error\b|\w+\(\)", str(error.value))


@pytest.mark.parametrize("part", ["none", "length", "header", "description", "data"])
def test_a_map_cut_short_is_said_to_be(part: str, tmp_path: Path) -> None:
    path = MAP.save(tmp_path / "conflict.safetensors")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    stop = {
        "none": 0,
        "length": 4,
        "header": header // 2,
        "description": header,
        "data": header + 100,
    }[part]
    path.write_bytes(whole[:stop])
    with pytest.raises(InputError, match=rf"not a conflict map: truncated: {stop} bytes") as error:
        ConflictMap.load(path)
    assert error.value.fix == "remove it and measure it again with `demerge analyze`"
