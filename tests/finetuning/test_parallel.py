"""Several processes: they see the data of one, take its steps, and stop together."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demerge.cli.common import stop_signals
from demerge.data import ImageData
from demerge.diffusion.adapters import load_model
from demerge.diffusion.model import Diffusion
from demerge.errors import Preempted, UsageError
from demerge.finetuning import FinetuneOptions
from demerge.finetuning.batches import Batches
from demerge.finetuning.train import check_output, train_ranges
from demerge.finetuning.trainer import Job
from demerge.parallel import World, join
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(0, 500)
OPTIONS = FinetuneOptions(
    max_train_steps=4,
    train_batch_size=2,
    gradient_accumulation_steps=2,
    checkpointing_steps=100,
    logging_steps=2,
    learning_rate=1e-3,
    adam_epsilon=1e-3,
)
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run_two(work: Callable[[World], object], killed_after: float | None = None) -> list[int]:
    """Run `work` in two processes that torch.distributed joins; return their exit codes.

    Args:
        killed_after: seconds after which both are killed.
    """
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            code = 1
            try:
                world, _ = join("cpu", 2)
                work(world)
                code = 0
            except Preempted:
                code = Preempted.exit_code
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    if killed_after is not None:
        time.sleep(killed_after)
        for child in children:
            os.kill(child, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


LORA = replace(OPTIONS, lora_rank=2)


def train(
    folder: Path, data: ImageData, out: Path, world: World, options: FinetuneOptions = OPTIONS
) -> Callable[[], None]:
    base = Diffusion.load(folder)
    inputs = check_output(base, data, [SPAN], options, out)
    job = Job(base, data, options, inputs, world=world)

    def steps(stop: Callable[[], bool] = lambda: False) -> None:
        for _ in train_ranges(job, [SPAN], out, stop):
            pass

    return steps


def sha256(out: Path) -> str:
    return Diffusion.load(out / str(SPAN)).sha256


def test_samples_count_over_all_processes(tiny: Path, data: ImageData) -> None:
    """One process with all, and two with half of each batch, draw the same samples in a step."""
    base = Diffusion.load(tiny)
    alone = replace(OPTIONS, train_batch_size=4)
    for step in range(2):
        whole = [
            piece
            for batch in Batches(base, data, SPAN, alone).step(step)
            for piece in batch.chunk(2)
        ]
        shares = [Batches(base, data, SPAN, OPTIONS, World(r, 2)).step(step) for r in range(2)]
        for i, piece in enumerate(whole):
            share = shares[i % 2][i // 2]
            for mine, theirs in zip(piece.tensors(), share.tensors(), strict=True):
                assert torch.equal(mine, theirs)


@FORKS
@pytest.mark.parametrize("options", [OPTIONS, LORA], ids=["whole", "lora"])
def test_two_processes_take_the_steps_of_one(
    tiny: Path, data: ImageData, tmp_path: Path, options: FinetuneOptions
) -> None:
    train(tiny, data, tmp_path / "one", World(), replace(options, train_batch_size=4))()
    codes = run_two(lambda world: train(tiny, data, tmp_path / "two", world, options)())
    assert codes == [0, 0]
    base = Diffusion.load(tiny)
    experts = [load_model(tmp_path / name / str(SPAN), base).denoiser for name in ("one", "two")]
    for first, second in zip(*(expert.parameters() for expert in experts), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    assert load_model(tmp_path / "two" / str(SPAN), base).sha256 != base.sha256
    logs = [(tmp_path / n / str(SPAN) / "log.jsonl").read_text() for n in ("one", "two")]
    assert [line.count("loss_by_bin") for line in logs] == [2, 2]


@FORKS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_stops_all_and_they_resume_to_the_same_bytes(
    tiny: Path, data: ImageData, tmp_path: Path, number: signal.Signals
) -> None:
    assert run_two(lambda world: train(tiny, data, tmp_path / "whole", world)()) == [0, 0]

    def interrupted(world: World) -> None:
        steps, calls = train(tiny, data, tmp_path / "cut", world), 0
        with stop_signals() as came:

            def stop() -> bool:
                nonlocal calls
                calls += 1
                if calls == 2 and world.rank == 1:
                    os.kill(os.getpid(), number)
                return bool(came())

            steps(stop)

    assert run_two(interrupted) == [75, 75]
    assert not (tmp_path / "cut" / str(SPAN)).exists()
    assert run_two(lambda world: train(tiny, data, tmp_path / "cut", world)()) == [0, 0]
    assert sha256(tmp_path / "cut") == sha256(tmp_path / "whole")


@FORKS
@pytest.mark.slow
def test_two_killed_processes_resume_to_the_same_bytes(
    tiny: Path, data: ImageData, tmp_path: Path
) -> None:
    options = replace(OPTIONS, max_train_steps=20, checkpointing_steps=1)

    def work(name: str) -> Callable[[World], None]:
        return lambda world: train(tiny, data, tmp_path / name, world, options)()

    start = time.perf_counter()
    assert run_two(work("whole")) == [0, 0]
    longest = time.perf_counter() - start
    for share in (0.4, 0.6, 0.5, 0.7):
        run_two(work("cut"), killed_after=share * longest)
    assert run_two(work("cut")) == [0, 0]
    assert sha256(tmp_path / "cut") == sha256(tmp_path / "whole")


def test_another_number_of_processes_is_an_error() -> None:
    with pytest.raises(UsageError, match="2 processes were expected, and this is one of 1") as e:
        join("cpu", 2)
    assert "torchrun --nproc-per-node 2" in str(e.value.fix)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_split_a_model_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UsageError, match=engine):
        join("cpu")
