"""Ranges in the words of other trainers: what each would draw lies in the range that is meant."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from demerge.errors import UsageError
from demerge.timestep_conventions import TrainerName, shift
from demerge.timesteps import Partition, TimestepRange
from demerge.trainers import TRAINERS, write_for

WAN = Partition.from_cuts(1000, [900])
FLAG = re.compile(r"--(\w+) ([\d.,]+)")
SCHEDULE = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000  # u of 1000 steps, noise first


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    return Partition.from_cuts(1000, sorted(draw(st.sets(st.integers(1, 49), max_size=4).map(
        lambda cuts: {20 * cut for cut in cuts}
    ))))  # fmt: skip


def lines_of(name: TrainerName, partition: Partition, s: float) -> list[str]:
    """The text for each range, without its comment."""
    ranges = write_for(name, partition, s).document()["ranges"]
    return ["\n".join(each["lines"]) for each in ranges]


def flags_of(text: str) -> dict[str, str]:
    return dict(FLAG.findall(text))


def owners(partition: Partition, t: torch.Tensor) -> set[int]:
    """The ranges of timesteps, of which 1000 belongs to the last; a boundary may be rounded down."""
    return {partition.route(min(round(float(value), 6), 999.0)) for value in t}


@given(partitions(), st.floats(0.5, 12))
@example(Partition.from_cuts(1000, [660]), 11.0)  # a step on the boundary
def test_diffsynth_draws_each_step_for_the_range_of_its_timestep(p: Partition, s: float) -> None:
    t, seen = 1000 * shift(SCHEDULE, s), 0
    for i, text in enumerate(lines_of("diffsynth", p, s)):
        flags = flags_of(text)
        steps = [int(float(flags[f"{end}_timestep_boundary"]) * 1000) for end in ("min", "max")]
        assert owners(p, t[steps[0] : steps[1]]) == {i}
        seen += steps[1] - steps[0]
    assert seen == 1000


@given(partitions())
def test_ai_toolkit_draws_steps_of_its_linear_schedule(p: Partition) -> None:
    t = torch.linspace(1000, 1, 1000, dtype=torch.float64)
    for i, text in enumerate(lines_of("ai-toolkit", p, 1)):
        train = yaml.safe_load(text)["train"]
        assert train["timestep_type"] == "linear"
        assert owners(p, t[train["min_denoising_steps"] : train["max_denoising_steps"]]) == {i}


@given(partitions(), st.floats(0.5, 12))
def test_onetrainer_draws_before_the_shift(p: Partition, s: float) -> None:
    v = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)
    for i, text in enumerate(lines_of("onetrainer", p, s)):
        config = json.loads("{" + text.rstrip(",") + "}")
        low, high = (int(1000 * config[f"{end}_noising_strength"]) for end in ("min", "max"))
        t = 1000 * shift((low + (high - low) * v) / 1000, config["timestep_shift"])
        assert owners(p, t.floor()) == {i}


@given(partitions(), st.floats(0.5, 12))
def test_simpletuner_has_a_list_of_sigmas(p: Partition, s: float) -> None:
    for i, text in enumerate(lines_of("simpletuner", p, s)):
        sigmas = [float(word) for word in flags_of(text)["flow_custom_timesteps"].split(",")]
        assert all(0 < sigma < 1 for sigma in sigmas) and sigmas == sorted(sigmas, reverse=True)
        assert owners(p, 1000 * torch.tensor(sigmas, dtype=torch.float64)) == {i}


def test_what_counts_timesteps_or_sigma_has_the_numbers_of_the_range() -> None:
    for name, shift_flag in (("musubi", "discrete_flow_shift"), ("kohya", "training_shift")):
        flags = [flags_of(text) for text in lines_of(name, WAN, 5)]  # type: ignore[arg-type]
        assert [(f["min_timestep"], f["max_timestep"]) for f in flags] == [
            ("0", "900"), ("900", "1000")
        ]  # fmt: skip
        assert [f[shift_flag] for f in flags] == ["5", "5"]
    assert "--preserve_distribution_shape" in lines_of("musubi", WAN, 5)[0]
    assert lines_of("kohya", WAN, 1)[0] == "--min_timestep 0 --max_timestep 900"
    model = tomllib.loads(lines_of("diffusion-pipe", WAN, 5)[1])["model"]
    assert model == {"shift": 5.0, "min_t": 0.9, "max_t": 1.0}


@pytest.mark.parity
@pytest.mark.parametrize(("cut", "share"), [(900, "0.358"), (875, "0.417")])
def test_wan_has_the_numbers_of_diffsynths_own_examples(cut: int, share: str) -> None:
    low, high = lines_of("diffsynth", Partition.from_cuts(1000, [cut]), 5)
    assert high == f"--min_timestep_boundary 0 --max_timestep_boundary {share}"
    assert low == f"--min_timestep_boundary {share} --max_timestep_boundary 1"


def test_what_a_trainer_cannot_say_is_refused() -> None:
    with pytest.raises(UsageError, match=r"schedule that its pipeline shifts"):
        write_for("diffsynth", WAN)
    for name in TRAINERS:
        with pytest.raises(UsageError, match="counts 1000 timesteps, the partition has 500"):
            write_for(name, Partition.uniform(500, 2), 1)
    narrow = Partition((TimestepRange(0, 2), TimestepRange(2, 3), TimestepRange(3, 1000)))
    for name in ("diffsynth", "onetrainer"):
        with pytest.raises(UsageError, match="no step of a schedule of 1000 with shift 5 lies in"):
            write_for(name, narrow, 5).lines()


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_says_where_its_convention_was_read(name: TrainerName) -> None:
    lines = write_for(name, WAN, 5)
    assert re.fullmatch(r"[\w-]+/[\w-]+: .+\.(py|md)", lines.trainer.source)
    assert lines.lines()[0] == "# 0000-0900" and lines.document()["boundary_ratio"] == 0.9
    assert lines.notes()[-1] == "diffusers boundary_ratio 0.9"
    assert len(write_for(name, Partition.uniform(1000, 3), 1).notes()) == 3


def test_a_shift_that_nobody_named_is_said() -> None:
    assert "shift     1, since none is known" in write_for("musubi", WAN).notes()[-2]
    assert not any("shift     " in note for note in write_for("musubi", WAN, 5).notes())
    assert any("5 is not used" in note for note in write_for("ai-toolkit", WAN, 5).notes())
