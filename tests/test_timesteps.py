"""Ranges and partitions: what they refuse, and that routing is right everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demerge.errors import InputError, UsageError
from demerge.timesteps import Partition, TimestepRange


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    total = draw(st.integers(1, 2000))
    cuts = draw(st.sets(st.integers(1, total - 1), max_size=12)) if total > 1 else set()
    return Partition.from_cuts(total, sorted(cuts))


def test_a_range_is_half_open_and_sorts_as_its_text_does():
    span = TimestepRange(0, 250)
    assert (str(span), len(span)) == ("0000-0250", 250)
    assert 0 in span
    assert 249.9 in span
    assert 250 not in span
    assert str(TimestepRange(250, 500)) > str(span)


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (6, 5), (-1, 5)])
def test_empty_and_negative_ranges_are_refused(start, stop):
    with pytest.raises(UsageError, match="empty or negative"):
        TimestepRange(start, stop)


@pytest.mark.parametrize("text", ["0:250", "0000-0250", " 0 : 250 "])
def test_parse_reads_both_spellings(text):
    assert TimestepRange.parse(text) == TimestepRange(0, 250)


@pytest.mark.parametrize("text", ["", "250", "a:b", "0:250:5", "-5:10"])
def test_parse_refuses_the_rest(text):
    with pytest.raises(UsageError):
        TimestepRange.parse(text)


@pytest.mark.parametrize("edges", [[], [(1, 5)], [(0, 5), (6, 9)], [(0, 5), (4, 9)]])
def test_gaps_overlaps_and_late_starts_are_refused(edges):
    with pytest.raises(UsageError):
        Partition(tuple(TimestepRange(a, b) for a, b in edges))


@given(partitions())
def test_routing_agrees_with_membership(partition):
    for t in {0, partition.total - 1, *partition.cuts, *(cut - 1 for cut in partition.cuts)}:
        assert t in partition[partition.route(t)]
        assert t + 0.5 in partition[partition.route(t + 0.5)]


@given(st.integers(1, 1000), st.integers(1, 8))
def test_every_inference_step_is_routed_to_the_range_that_holds_it(steps, n):
    partition = Partition.uniform(1000, n)
    for t in np.linspace(999, 0, steps):
        assert t in partition[partition.route(float(t))]


@given(st.integers(1, 2000).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_uniform_covers_all_with_widths_that_differ_by_one_at_most(case):
    total, n = case
    widths = [len(span) for span in Partition.uniform(total, n)]
    assert (sum(widths), len(widths)) == (total, n)
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("t", [-1, 1000.5, 1e9])
def test_timesteps_outside_are_refused(t):
    with pytest.raises(UsageError, match="outside"):
        Partition.uniform(1000, 4).route(t)
    assert Partition.uniform(1000, 4).route(1000) == 3  # pure noise of a flow


@pytest.mark.parametrize("n", [0, 11])
def test_uniform_refuses_impossible_counts(n):
    with pytest.raises(UsageError):
        Partition.uniform(10, n)


@given(partitions())
def test_save_and_load_give_the_same(tmp_path_factory, partition):
    path = tmp_path_factory.mktemp("partition") / "partition.json"
    partition.save(path)
    assert Partition.load(path) == partition


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"ranges": 5}', '{"ranges": [[0]]}', '{"ranges": [["a", "b"]]}', "\xff"],
)
def test_files_that_are_no_partition_are_input_errors(tmp_path, text):
    path = tmp_path / "partition.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"partition\.json"):
        Partition.load(path)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A pipeline of two denoisers with the boundary 0.875, of weights of no bytes."""
    (tmp_path / "transformer_2").mkdir()
    index = {"transformer": ["diffusers", "X"], "transformer_2": ["diffusers", "X"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    return tmp_path


def test_a_pipeline_of_two_denoisers_is_a_partition(pair):
    partition = Partition.load(pair)
    assert (partition.cuts, partition.total, partition.boundary_ratio) == ([875], 1000, 0.875)
    assert Partition.parse(str(pair), 1000) == partition
    (pair / "scheduler").mkdir()
    (pair / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 100}')
    assert Partition.load(pair).cuts == [88]
    index = json.loads((pair / "model_index.json").read_text())
    (pair / "model_index.json").write_text(json.dumps(index | {"transformer_2": [None, None]}))
    assert Partition.of_pipeline(pair) is None
    with pytest.raises(InputError, match="not a pipeline of two denoisers"):
        Partition.load(pair)


@given(st.integers(2, 2000).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T - 1))))
def test_two_ranges_have_the_boundary_ratio_that_gives_them_back(case):
    T, cut = case
    partition = Partition.from_cuts(T, [cut])
    ratio = partition.boundary_ratio
    assert Partition.from_boundary(ratio, T) == partition
    assert cut >= ratio * T > cut - 1  # diffusers sends t >= ratio T to `transformer`
    assert ratio == pytest.approx(cut / T)


def test_three_ranges_have_no_boundary_ratio_and_a_boundary_needs_two_sides():
    assert Partition.uniform(1000, 3).boundary_ratio is None
    assert Partition.from_boundary(0.1234, 1000).cuts == [124]
    with pytest.raises(UsageError, match="without timesteps"):
        Partition.from_boundary(1.0, 1000)


def test_a_file_with_a_gap_says_so(tmp_path):
    path = tmp_path / "partition.json"
    path.write_text(json.dumps({"ranges": [[0, 5], [6, 9]]}))
    with pytest.raises(InputError, match="gap"):
        Partition.load(path)


def test_a_partition_is_read_from_words_or_a_file(tmp_path):
    path = tmp_path / "partition.json"
    Partition.from_cuts(1000, [100]).save(path)
    assert Partition.parse("uniform:4", 1000) == Partition.uniform(1000, 4)
    assert Partition.parse("joint", 1000).ranges == (TimestepRange(0, 1000),)
    assert Partition.parse(str(path), 1000).cuts == [100]
    with pytest.raises(UsageError, match="covers 1000 timesteps, the base has 500"):
        Partition.parse(str(path), 500)
    with pytest.raises(UsageError, match="covers 250 timesteps, the base has 1000"):
        Partition.parse("0:250", 1000)
    for text in ("uniform", "uniform:-1", "joint:4", "nowhere.json"):
        with pytest.raises(UsageError, match="neither uniform:N, joint, START:STOP"):
            Partition.parse(text, 1000, also="none")


@given(partitions())
def test_a_list_of_ranges_is_read_in_any_order(partition):
    assert Partition.parse(partition.text, partition.total) == partition
    backwards = ", ".join(reversed(partition.text.split(",")))
    assert Partition.parse(backwards, partition.total) == partition


@pytest.mark.parametrize("text", ["0:500,600:1000", "0:500,400:1000", "0:500,", "5:1000", "0:1e3"])
def test_lists_that_do_not_cover_are_refused(text):
    with pytest.raises(UsageError) as error:
        Partition.parse(text, 1000)
    assert error.value.fix


def test_reprs_are_short_and_make_the_value_again() -> None:
    partition = Partition.from_cuts(1000, [250, 500])
    assert repr(partition) == "Partition.from_cuts(1000, [250, 500])"
    assert repr(partition[0]) == "TimestepRange(0, 250)"
    assert eval(repr(partition)) == partition and eval(repr(partition[0])) == partition[0]
    assert (
        repr(Partition.uniform(1000, 20)) == "Partition.from_cuts(1000, [50, 100, 150, ..., 950])"
    )
    assert repr(Partition.uniform(10, 1)) == "Partition.from_cuts(10, [])"
