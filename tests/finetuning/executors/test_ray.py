"""Tasks on a Ray cluster of two nodes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demerge.diffusion.model import Diffusion
from demerge.errors import Preempted
from demerge.finetuning import FinetuneInputs, FinetuneOptions, plan
from demerge.finetuning.executors.options import ExecutorOptions
from demerge.finetuning.executors.tasks import TasksFailed

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
SPANS = ("0000-0500", "0500-1000")
OPTIONS = FinetuneOptions(
    max_train_steps=100, train_batch_size=2, checkpointing_steps=10, logging_steps=5
)


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A head and a node, one CPU each, so that each runs one task."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def planned(model: Path, out: Path, execution: ExecutorOptions, options=OPTIONS) -> Any:
    inputs = FinetuneInputs(
        model=str(model), out=out, data="digits", device="cpu", ranges="uniform:2"
    )
    return plan(inputs, options, execution)


def hashes(out: Path) -> list[str]:
    return [Diffusion.load(out / span).sha256 for span in SPANS]


def test_a_killed_node_changes_nothing(cluster: Any, tiny: Path, tmp_path: Path) -> None:
    planned(tiny, tmp_path / "one", ExecutorOptions(num_workers=1)).run()
    second = cluster.add_node(num_cpus=1)
    out, killed = tmp_path / "ray", list[float]()

    def kill_when_both_train(done: int, total: int, text: str = "") -> None:
        if not killed and all(list((out / "state" / span).glob("step-*")) for span in SPANS):
            killed.append(time.monotonic())
            cluster.remove_node(second, allow_graceful=False)

    result = planned(tiny, out, ExecutorOptions(executor="ray")).run(kill_when_both_train)
    assert killed, "both experts were finished before the node could be killed"
    assert result.plan.finished_steps == 200
    assert hashes(out) == hashes(tmp_path / "one")
    assert not (out / "state").exists()


def test_a_stop_saves_and_the_same_call_continues(cluster: Any, tiny: Path, tmp_path: Path) -> None:
    planned(tiny, tmp_path / "one", ExecutorOptions(num_workers=1)).run()
    out = tmp_path / "ray"
    log = out / "state" / SPANS[0] / "log.jsonl"
    first = replace(planned(tiny, out, ExecutorOptions(executor="ray")), stop=log.exists)
    with pytest.raises(Preempted, match="2 of 2 experts are not finished"):
        first.run()
    assert list((out / "state" / SPANS[0]).glob("step-*"))
    planned(tiny, out, ExecutorOptions(executor="ray")).run()
    assert hashes(out) == hashes(tmp_path / "one")


def test_a_failure_is_named_with_its_code(cluster: Any, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    work = planned(tiny, out, ExecutorOptions(executor="ray"), replace(OPTIONS, max_train_steps=2))
    out.mkdir()
    (out / SPANS[1]).write_text("in the way")
    with pytest.raises(TasksFailed, match=f"1 of 2 experts failed: {SPANS[1]}") as failed:
        work.run()
    assert failed.value.exit_code in (2, 3)
    assert (out / SPANS[0] / "expert.json").is_file()
