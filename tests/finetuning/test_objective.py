"""The objective against the paper's formulas, and the draws against their distribution."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from demerge.diffusion.model import Diffusion
from demerge.errors import UsageError
from demerge.finetuning import FinetuneOptions
from demerge.finetuning.objective import (
    check_density,
    consistency_weight,
    draw_timesteps,
    learning_rate,
    loss_weights,
)
from demerge.timesteps import TimestepRange

SPAN = TimestepRange(250, 500)


def test_timesteps_follow_the_mixture() -> None:
    t = draw_timesteps(SPAN, 1000, FinetuneOptions(global_prob=0.3), 0, range(20000))
    inside = ((t >= 250) & (t < 500)).double().mean()
    assert float(inside) == pytest.approx(0.7 + 0.3 * 0.25, abs=0.012)
    assert int(t.min()) >= 0
    assert int(t.max()) < 1000
    assert float(t[t >= 500].double().mean()) == pytest.approx(750, abs=15)


@pytest.mark.parametrize(("p", "low", "high"), [(0.0, 250, 500), (1.0, 0, 1000)])
def test_extremes_of_p(p: float, low: int, high: int) -> None:
    t = draw_timesteps(SPAN, 1000, FinetuneOptions(global_prob=p), 3, range(4000))
    assert low <= int(t.min()) < low + 20
    assert high - 20 <= int(t.max()) < high


def test_a_draw_depends_on_step_and_sample_alone() -> None:
    options = FinetuneOptions(seed=7)
    whole = draw_timesteps(SPAN, 1000, options, 5, range(10))
    torch.testing.assert_close(draw_timesteps(SPAN, 1000, options, 5, [3, 8]), whole[[3, 8]])
    assert not torch.equal(draw_timesteps(SPAN, 1000, options, 6, range(10)), whole)


def test_paper_sampling_tosses_once_and_mirrors() -> None:
    options = FinetuneOptions(sampling="paper", global_prob=0.0)
    t = draw_timesteps(SPAN, 1000, options, 2, range(8))
    sums = t[:4] + t[4:]
    assert torch.all((sums - (250 + 499)).abs() <= 1)
    inside = [
        bool(
            (
                (d := draw_timesteps(SPAN, 1000, FinetuneOptions(sampling="paper"), s, range(64)))
                >= 250
            ).all()
            and (d < 500).all()
        )
        for s in range(200)
    ]
    assert sum(inside) / 200 == pytest.approx(0.7, abs=0.1)


ON_X0 = {
    "min-snr": lambda snr: snr.clamp(max=5.0),
    "truncated-snr": lambda snr: snr.clamp(min=1.0),
    "snr+1": lambda snr: snr + 1,
    "p2": lambda snr: snr / (1 + snr),
}
OF_X0 = {"epsilon": lambda snr: snr, "v_prediction": lambda snr: snr + 1, "sample": torch.ones_like}
# w at SNR = 0 and at SNR = infinity; None where it is infinite and refused
LIMITS = {
    ("min-snr", "epsilon"): (1, 0),
    ("min-snr", "v_prediction"): (0, 0),
    ("min-snr", "sample"): (0, 5),
    ("truncated-snr", "epsilon"): (None, 1),
    ("truncated-snr", "v_prediction"): (1, 1),
    ("truncated-snr", "sample"): (1, None),
    ("snr+1", "epsilon"): (None, 1),
    ("snr+1", "v_prediction"): (1, 1),
    ("snr+1", "sample"): (1, None),
    ("p2", "epsilon"): (1, 0),
    ("p2", "v_prediction"): (0, 0),
    ("p2", "sample"): (0, 1),
    ("one", "epsilon"): (1, 1),
    ("one", "v_prediction"): (1, 1),
    ("one", "sample"): (1, 1),
}


@pytest.mark.parametrize("prediction_type", OF_X0)
@pytest.mark.parametrize("name", ON_X0)
def test_a_weight_is_one_weighting_of_the_x0_error(
    make_tiny, prediction_type: str, name: str
) -> None:
    model = Diffusion.load(make_tiny(prediction_type=prediction_type))
    snr = model.snr()
    assert snr.dtype == torch.float64
    weights = loss_weights(model, FinetuneOptions(loss_weight=name))
    torch.testing.assert_close(
        weights, ON_X0[name](snr) / OF_X0[prediction_type](snr), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(("name", "prediction_type"), LIMITS)
@pytest.mark.parametrize("end", [0, 1])
def test_weights_have_their_limits(tiny: Path, name: str, prediction_type: str, end: int) -> None:
    betas = [0.0, 0.1, 0.3] if end else [0.1, 0.3, 1.0]  # abar = 1 at the first, 0 at the last
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=3, trained_betas=betas, prediction_type=prediction_type
    )
    model, limit = (
        replace(Diffusion.load(tiny), scheduler=scheduler),
        LIMITS[name, prediction_type][end],
    )
    assert float(model.alphas_cumprod[0 if end else -1]) == end
    options = FinetuneOptions(loss_weight=name)
    if limit is None:
        with pytest.raises(
            UsageError,
            match=rf"{re.escape(name)} is inf at t = {0 if end else 2}: abar is {end}",
        ):
            loss_weights(model, options)
        return
    weights = loss_weights(model, options)
    assert bool(torch.isfinite(weights).all())
    assert float(weights[0 if end else -1]) == limit


SCHEDULE = {"num_train_timesteps": 10, "trained_betas": [0.3] * 10}


def test_a_stand_in_for_zero_terminal_snr_is_refused_as_well(tiny: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        **SCHEDULE, rescale_betas_zero_snr=True
    )  # abar = 2^-24 at the last t
    model = replace(Diffusion.load(tiny), scheduler=scheduler)
    assert float(loss_weights(model, FinetuneOptions(loss_weight="min-snr"))[-1]) == 1
    with pytest.raises(UsageError, match=r"truncated-snr is 1\.68e\+07 at t = 9"):
        loss_weights(model, FinetuneOptions(loss_weight="truncated-snr"))


def test_unit_weight_is_one(tiny: Path) -> None:
    assert torch.all(loss_weights(Diffusion.load(tiny), FinetuneOptions()) == 1)


def test_schedules_begin_and_end_where_they_say() -> None:
    options = FinetuneOptions(
        max_train_steps=10, consistency=2.0, consistency_schedule="linear", lr_scheduler="cosine"
    )
    assert consistency_weight(options, 0) == 2.0
    assert consistency_weight(options, 5) == 1.0
    assert consistency_weight(options, 10) == 0.0
    assert learning_rate(options, 0) == options.learning_rate
    assert learning_rate(options, 10) == pytest.approx(0)
    warm = FinetuneOptions(lr_warmup_steps=4)
    assert [learning_rate(warm, s) / warm.learning_rate for s in range(5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_prob", 1.5),
        ("learning_rate", 0.0),
        ("max_train_steps", 0),
        ("loss_weight", "x"),
        ("ema_decay", 1.0),
    ],
)
def test_bad_option_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value!r}"):
        FinetuneOptions(**{name: value})  # type: ignore[arg-type]


def test_options_of_flows_need_a_flow(tiny: Path) -> None:
    model, ranges = Diffusion.load(tiny), [TimestepRange(0, 1000)]
    check_density(model, FinetuneOptions(), ranges)
    with pytest.raises(UsageError, match="shift is 3") as refused:
        check_density(model, FinetuneOptions(shift=3), ranges)
    assert "--shift" in refused.value.fix


def test_a_density_reaches_each_range(tiny: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = replace(Diffusion.load(tiny), scheduler=scheduler)
    ranges = [TimestepRange(0, 900), TimestepRange(900, 1000)]
    check_density(model, FinetuneOptions(density="logit-normal"), ranges)
    narrow = FinetuneOptions(density="logit-normal", logit_std=0.01)
    with pytest.raises(UsageError, match="gives range 0900-1000 0 of its draws"):
        check_density(model, narrow, ranges)
