"""Every record that a command reads, changed at random: it is read or refused in one sentence, soon, in little memory.

A record is changed in its values (other types, sizes, depths), its keys (lost, renamed, added, twice) or its bytes. Each
reader is what a command calls; anything that it raises but a DemergeError fails the test.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from demerge.analysis.layers.gains import choose_layers
from demerge.analysis.measurement.checkpoint import MeasurementCheckpoint
from demerge.analysis.measurement.schedule import check_same_schedule, log_snr
from demerge.analysis.partitioning.options import RangesOptions
from demerge.analysis.planning import ranges as ranges_command
from demerge.conflict import LAYER_K, Array, ConflictMap, Origin
from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.diffusion.options import SamplingOptions
from demerge.diffusion.sampling import sample
from demerge.errors import DemergeError
from demerge.evaluation.models import detect_kind, specify_models
from demerge.evaluation.report.tables import markdown, table_lines
from demerge.evaluation.report.verdict import Findings
from demerge.evaluation.results import load_results, save_scores
from demerge.evaluation.scores import Protocol, Scores, tables_of
from demerge.expert import list_experts
from demerge.finetuning.checkpoint import Manifest
from demerge.finetuning.layers import load_layers
from demerge.finetuning.options import FinetuneOptions
from demerge.finetuning.trainer import ExpertTraining, Job
from demerge.inspection import inspect_model
from demerge.lora import open_expert
from demerge.merging import Recipe
from demerge.merging import plan as plan_merge
from demerge.merging.recipe.weight_files import check_order, read_weight_file
from demerge.provenance import MEASURED, measured_on
from demerge.statistics.record import has_statistic
from demerge.storage.atomic import commit_json
from demerge.storage.checkpoint import Checkpoint
from demerge.storage.schema import read_record
from demerge.timesteps import Partition, TimestepRange

SECONDS = 5
MEMORY = 1 << 30  # bytes that all cases together may add
ADDRESSES = (
    8 << 30
)  # of address space beyond what is in use: a bomb ends here, not with the machine
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        -8,
        3,
        1.5,
        0.0,
        1e308,
        -1e-300,
        1 << 31,
        1 << 40,
        1 << 62,
        1 << 63,
        1 << 200,
    ),
    *("", "x", "8", "\x00", "\ud800", "../../x", "/etc/passwd", "\x1b[31m", "{}", "x" * 100_000),
    *(
        [],
        [1],
        [None],
        [0, 1],
        [1 << 40, 1 << 40],
        ["x"] * 3,
        [[[]]],
        [0.5] * 10_000,
        {},
        {"x": 1},
        {"": None},
    ),
)
TOKENS = (
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"9" * 400,
    b"[" * 5000,
    b'{"a":' * 40 + b"1" + b"}" * 40,
    b'"\\ud800"',
    b"\xff",
)
Read = Callable[[], object]


# -- what is changed -----------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a document."""
    if path:
        yield path
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in list(children)[:50]:
        yield from places(child, (*path, key))


def changed(document: Any, chance: random.Random) -> Any:
    """Return a document with a value or a key changed."""
    document = json.loads(json.dumps(document))
    path = chance.choice(list(places(document)) or [("x",)])
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    how, key = chance.random(), path[-1]
    if how < 0.65:
        holder[key] = chance.choice(VALUES)
    elif how < 0.75:
        del holder[key]
    elif how < 0.85:
        other = chance.choice(list(places(document)))
        holder[key] = other[-1]
    elif isinstance(holder, dict):
        holder[chance.choice(["x", "format", "ranges", f"{key}x", "\x1b"])] = (
            holder[key] if how < 0.92 else holder.pop(key)
        )
    else:
        holder.extend([holder[key]] * chance.choice([1, 2, 100]))
    return document


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return bytes with some changed, cut, doubled or put in."""
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    how = chance.randrange(5)
    if how == 0:
        return content[:first] + bytes([chance.randrange(256)]) + content[first + 1 :]
    if how == 1:
        return content[:first]
    if how == 2:
        return content[:last] + content[first:]
    if how == 3:
        return content[:first] + content[last:]
    return content[:first] + chance.choice(TOKENS) + content[first:]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return a JSON file with one to three changes."""
    if chance.random() < 0.2:
        return damaged(content, chance)
    document = json.loads(content)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        document = changed(document, chance) if document else {}
    text = json.dumps(document)
    if chance.random() < 0.1:
        text = text.replace("1", chance.choice(["NaN", "1e400", "[" * 5000, '"1"']), 1)
    return text.encode()


def mutated_line(content: bytes, chance: random.Random) -> bytes:
    """Return a file of JSON lines with its first one changed."""
    first, _, rest = content.partition(b"\n")
    return mutated(first, chance) + b"\n" + rest


def mutated_metadata(key: str) -> Callable[[bytes, random.Random], bytes]:
    """Return what changes the JSON that a safetensors file says of itself under a key."""

    def mutate(content: bytes, chance: random.Random) -> bytes:
        if chance.random() < 0.2:
            return (
                damaged(content[: 8 + struct.unpack("<Q", content[:8])[0]], chance) + content[-8:]
            )
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"][key] = mutated(header["__metadata__"][key].encode(), chance).decode(
            errors="replace"
        )
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return mutate


@dataclass(frozen=True)
class Target:
    """A record, what reads it, how it is changed, and its share of the cases."""

    file: Path
    readers: Sequence[Read]
    share: float = 1.0
    mutate: Callable[[bytes, random.Random], bytes] = mutated


# -- the records ---------------------------------------------------------------------------------------------------------


def config(folder: Path, *names: str) -> Path:
    return folder.joinpath(*names)


def expert(base: Path, folder: Path, start: int, stop: int) -> Path:
    shutil.copytree(base, folder)
    record = {
        "format": "demerge.expert/1",
        "range": [start, stop],
        "base_sha256": Diffusion.load(base).sha256,
        "steps": 2,
    }
    record |= {"skipped_steps": 0, "train_layers": None, "options": FinetuneOptions().document()}
    commit_json(
        folder / "expert.json",
        {**record, "inputs": {"data": "digits", "data_fingerprint": "0" * 64}},
    )
    return folder


def a_map(model: str, schedule: Array) -> ConflictMap:
    N, M, sizes = 4, 5, {"a.weight": 600, "a.bias": 4, "b.weight": 30}
    chance = np.random.default_rng(0)
    steady = np.eye(N, 9)[:, None] + 0.1 * chance.standard_normal((N, M, 9))
    wide = chance.standard_normal((N, M, LAYER_K + 30)).astype(np.float32)
    origin = Origin(model, "d", sum(sizes.values()), "exact", "shared", False, "euclid", 4, 0)
    gram = np.einsum("imd,jnd->imjn", steady, steady)
    return ConflictMap(
        Partition.uniform(len(schedule), N), gram, schedule, origin, sizes, None, wide
    )


def some_scores(folder: Path) -> Path:
    protocol = Protocol("f", "0" * 64, "none", "fd", 64, 500, "digits", 500, "0" * 64, "ddim", 20)
    images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    for model, kind in (("base", "base"), ("joint", "joint"), ("ties", "merge")):
        for seed in range(3):
            value = Scores(
                model, {"fd": 5.0 + seed + len(model), "kid": 0.1}, protocol, "0" * 64, seed, kind
            )  # type: ignore[arg-type]
            save_scores(folder / f"{model}.seed{seed}.json", value, images)
    return folder / "ties.seed1.json"


@pytest.fixture(scope="module")
def targets(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_text: Path, tiny_dit: Path
) -> list[Target]:
    root = tmp_path_factory.mktemp("records")
    base, text, dit = (
        Path(shutil.copytree(m, root / n))
        for m, n in ((tiny, "base"), (tiny_text, "text"), (tiny_dit, "dit"))
    )
    model = Diffusion.load(base)
    first, second = (
        expert(base, root / "run" / "0000-0500", 0, 500),
        expert(base, root / "run" / "0500-1000", 500, 1000),
    )

    pictures = root / "pictures"
    pictures.mkdir()

    def recipe(method: str = "average", **asked: Any) -> Read:
        return lambda: plan_merge(
            Recipe.of(base, [first, second], method=method, **asked), num_workers=1
        )

    def seen() -> object:
        return load_images(str(pictures), split="all", resolution=8, channels=3)

    def weighed() -> object:
        weights, rules = read_weight_file(root / "weights.json")
        check_order(root / "weights.json", [str(first), str(second)])
        return recipe("task_arithmetic", weights=weights, rules=rules)()

    def drawn(folder: Path, **asked: Any) -> Read:
        def read() -> object:
            loaded = Diffusion.load(folder)
            repr(loaded.image_shape)
            return [
                sample(loaded, 1, SamplingOptions(steps=2, sampler=name), **asked)
                for name in ("ddim", "base")
            ]

        return read

    # a partition, a map, a choice of layers, weights, scores, commands
    Partition.uniform(1000, 4).save(root / "partition.json")
    a_map(model.sha256, log_snr(model)).save(root / "conflict.safetensors")
    choice = {
        "format": "demerge.layers/1",
        "model": model.sha256,
        "ranges": [[0, 500], [500, 1000]],
        "train": ["conv_out"],
    }
    commit_json(root / "layers.json", choice)
    weights = {
        "format": "demerge.coefficients/1",
        "weights": [0.5, 0.5],
        "blocks": {"down.0": [0.3, 0.7], "up": ["0.2..0.4", 1]},
    }
    commit_json(
        root / "weights.json",
        {**weights, "tensors": {"conv_in.weight": [0, 1]}, "record": {"inputs": {"experts": []}}},
    )
    score = some_scores(root / "scored" / "scores")
    commit_json(root / "scored" / "commands.json", {"commands": ["demerge demo"]})

    # a finished merge, a statistic, a checkpoint of training, a part of a measurement
    out = root / "merged"
    plan_merge(Recipe.of(base, [first, second], method="average"), num_workers=1, out=out).run()
    inputs = {
        "model_sha256": model.sha256,
        "data": "digits",
        "data_fingerprint": "0" * 64,
        "range": [0, 500],
    }
    commit_json(
        first / "stats.json",
        {"format": "demerge.stats/1", "fisher": {"inputs": inputs, "options": {"samples": 2}}},
    )
    for folder, metadata in (
        (first, None),
        (second, {MEASURED: json.dumps({**inputs, "range": [500, 1000]})}),
    ):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file), folder / "fisher.safetensors", metadata)
    images = load_images("digits", split="test", resolution=8, channels=1)
    options = FinetuneOptions(max_train_steps=2, train_batch_size=2, projection="none")
    facts = {"base_sha256": model.sha256, "data": images.name}

    def begun() -> ExpertTraining:
        return ExpertTraining(
            Job(model, images, options, facts), TimestepRange(0, 500), root / "state"
        )

    run = begun()
    run.step = 1
    run.save_checkpoint()
    (manifest,) = (root / "state").glob("step-*/manifest.json")
    MeasurementCheckpoint(root / "parts", {"model": "m", "bins": [0, 1], "seed": 0}).save(
        "pilot", torch.ones(2)
    )
    part = root / "parts" / "pilot.safetensors"

    # configs of models, an adapter, an index of shards, captions
    sharded = Path(shutil.copytree(base / "unet", root / "sharded"))
    stem = "diffusion_pytorch_model"
    tensors = load_file(sharded / f"{stem}.safetensors")
    (sharded / f"{stem}.safetensors").rename(sharded / f"{stem}-00001-of-00001.safetensors")
    shards = dict.fromkeys(tensors, f"{stem}-00001-of-00001.safetensors")
    commit_json(
        sharded / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": 1}, "weight_map": shards},
    )
    adapter = root / "adapter"
    adapter.mkdir()
    factors = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    commit_json(
        adapter / "adapter_config.json",
        {"r": 2, "lora_alpha": 2, "peft_type": "LORA", "rank_pattern": {}},
    )
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(pictures / f"{i}.png")
    (pictures / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "text": "x"}) for i in range(2))
    )
    made = {
        "unet": json.loads((base / "unet" / "config.json").read_text()),
        "scheduler": {"num_train_timesteps": 100},
    }
    commit_json(root / "made.json", made)
    file_of_map = root / "conflict.safetensors"
    merged = [
        lambda: Recipe.read(out),
        lambda: detect_kind(out),
        lambda: inspect_model(out),
        lambda: specify_models([f"x={out}"]),
    ]
    whole = [
        lambda: inspect_model(base),
        recipe(),
        drawn(base),
        lambda: check_same_schedule(a_map("m", log_snr(model)), root, str(base)),
    ]
    scored = [
        lambda: load_results([root / "scored"]),
        lambda: table_lines(tables_of(load_results([score]).scores)),
    ]
    tables = [
        *scored,
        lambda: [
            markdown(Findings.of(t), "t", [])
            for t in tables_of(load_results([root / "scored"]).scores)
        ],
    ]
    measured = [
        lambda: measured_on(Checkpoint.open(first / "fisher.safetensors")),
        lambda: has_statistic(first, "fisher", inputs, {}),
    ]
    fishers = ",".join(str(folder / "fisher.safetensors") for folder in (first, second))
    by_fisher = recipe("fisher", options={"fisher": fishers})
    experts = [
        lambda: list_experts(root / "run"),
        lambda: detect_kind(first),
        lambda: inspect_model(first),
        recipe(),
    ]
    ranged = [
        lambda: (
            ranges_command.plan(RangesOptions(map=file_of_map, model=str(base), ranges=2))
            .run()
            .lines()
        )
    ]
    layered = [
        lambda: choose_layers(ConflictMap.load(file_of_map), Partition.uniform(1000, 2)).lines()
    ]
    caption = {"captions": ["a cat"]}
    return [
        Target(first / "expert.json", experts, 2),
        Target(
            root / "partition.json",
            [lambda: Partition.parse(str(root / "partition.json"), 1000)],
            4,
        ),
        Target(file_of_map, [*ranged, *layered], 2, mutated_metadata("demerge")),
        Target(root / "layers.json", [lambda: load_layers(root / "layers.json", model)], 4),
        Target(root / "weights.json", [weighed], 3),
        Target(
            out / "demerge.json", [*merged, lambda: plan_merge(Recipe.read(out), num_workers=1)], 3
        ),
        Target(score, tables, 4),
        Target(root / "scored" / "commands.json", [lambda: load_results([root / "scored"])], 1),
        Target(first / "stats.json", measured, 3),
        Target(second / "fisher.safetensors", [by_fisher], 1, mutated_metadata(MEASURED)),
        Target(manifest, [begun, lambda: read_record(manifest, Manifest, fix="remove it")], 2),
        Target(part, [lambda: parts(part)], 1, mutated_metadata("demerge")),
        Target(base / "model_index.json", whole, 1.5),
        Target(base / "unet" / "config.json", whole, 1.5),
        Target(base / "scheduler" / "scheduler_config.json", whole, 1.5),
        Target(text / "model_index.json", [drawn(text, **caption)], 0.3),
        Target(text / "unet" / "config.json", [drawn(text, **caption)], 0.3),
        Target(text / "vae" / "config.json", [drawn(text, **caption)], 0.5),
        Target(text / "text_encoder" / "config.json", [drawn(text, **caption)], 0.5),
        Target(text / "tokenizer" / "tokenizer_config.json", [drawn(text, **caption)], 0.3),
        Target(dit / "transformer" / "config.json", [drawn(dit)], 0.5),
        Target(sharded / f"{stem}.safetensors.index.json", [lambda: inspect_model(sharded)], 1),
        Target(
            adapter / "adapter_config.json",
            [lambda: open_expert(adapter, {"x.weight": torch.ones(4, 3)})["x.weight"]],
            2,
        ),
        Target(
            pictures / "metadata.jsonl",
            [lambda: load_images(str(pictures), split="all", resolution=8, channels=3)],
            2,
            mutated_line,
        ),
        Target(root / "made.json", [lambda: Diffusion.random(root / "made.json", seed=0)], 1),
    ]


def parts(file: Path) -> object:
    partial = MeasurementCheckpoint(file.parent, {"model": "m", "bins": [0, 1], "seed": 0})
    partial.check()
    return partial.load("pilot", [2])


# -- the test ------------------------------------------------------------------------------------------------------------


@contextmanager
def bounded() -> Iterator[None]:
    """Let nothing take more address space than a bomb would."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def soon() -> Iterator[None]:
    """End what takes too many seconds of the processor, however busy it is."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def attempt(
    target: Target, content: bytes, whole: bytes, readers: Sequence[int]
) -> tuple[int, list[str]]:
    """Read a changed record by some of what reads it; return how many refused it, and what else was raised."""
    refused, faults = 0, []
    target.file.write_bytes(content)
    for number in readers:
        try:
            with soon():
                target.readers[number]()
        except DemergeError as error:
            refused += 1
            if not error.what or len(error.what) > 3000:
                faults.append(f"{number}: a sentence of {len(error.what)} characters")
        except Exception as error:
            faults.append(f"reader {number}: {type(error).__name__}: {str(error)[:300]}")
    target.file.write_bytes(whole)
    return refused, faults


def fuzz(targets: Sequence[Target], cases: int, seed: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = sum(target.share for target in targets)
    found: dict[str, bytes] = {}
    for target in targets:
        whole = target.file.read_bytes()
        assert attempt(target, whole, whole, range(len(target.readers))) == (0, []), target.file
    with bounded():
        for index, target in enumerate(targets):
            whole, refused = target.file.read_bytes(), 0
            n = max(6, round(cases * target.share / total))
            for case in range(n):
                chance = random.Random(f"{seed} {index} {case}")
                content = target.mutate(whole, chance)
                some, faults = attempt(target, content, whole, [case % len(target.readers)])
                refused += some
                found |= {
                    f"{target.file.name} {fault}": content[:2000]
                    for fault in faults
                    if fault not in found
                }
            assert refused > n / 8, f"{target.file} was hardly ever refused"
    assert not found, "\n".join(f"{fault}\n    {content!r}" for fault, content in found.items())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


def test_changed_records_are_read_or_refused(targets: list[Target]) -> None:
    fuzz(targets, 300, seed=0)


@pytest.mark.slow
def test_more_changed_records_are_read_or_refused(targets: list[Target]) -> None:
    fuzz(targets, 20_000, seed=1)
