"""Every registered method: the named properties, hypothesis input, and a line computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging import all_methods, merge_tensors
from demerge.merging.contract import Block, Method, Statistic, describe_method
from demerge.merging.methods.shared import selection
from demerge.testing import (
    PROPERTIES,
    HeldBlocks,
    Property,
    check_method,
    sessions_follow_the_weights,
)
from demerge.timesteps import TimestepRange

METHODS = list(all_methods().values())
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"scope": "tensor"}),
    ("ties", {"elect": "count"}),
    ("dare", {"rescale": "l1"}),
    ("dare", {"then": "ties"}),
    ("dare", {"then": "ties", "rescale": "l1"}),
    ("fisher", {"normalise": "l2"}),
    ("fisher", {"normalise": "layer"}),
]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_property(method: Method, check: Property) -> None:
    check(method, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_all_properties_with_three_seeds(method: Method) -> None:
    check_method(method.function)


def test_check_method_finds_a_statistic_that_uses_weights_without_saying_so() -> None:
    def divided(base: Tensor, deltas: Tensor, *, weights: Tensor, total: Tensor) -> Tensor:
        return base + torch.einsum("k,k...->...", weights, deltas) / total

    statistic = Statistic("total", lambda blocks, *, weights: weights[0], uses_weights=False)
    wrong = describe_method(divided, "divided", statistics=(statistic,))
    with pytest.raises(AssertionError):
        sessions_follow_the_weights(wrong, seed=0)


def test_check_method_finds_a_wrong_method() -> None:
    def forgets_the_base(base: Tensor, deltas: Tensor, *, weights: Tensor) -> Tensor:
        return deltas.sum(0)

    with pytest.raises(AssertionError, match="Experts equal to the base"):
        check_method(forgets_the_base)


def test_check_method_finds_a_method_in_which_weight_zero_has_a_say() -> None:
    def counts_all(base: Tensor, deltas: Tensor, *, weights: Tensor) -> Tensor:
        merged = base + torch.einsum("k,k...->...", weights, deltas)
        return merged + 1e-3 * (deltas.amax(0) - deltas.amin(0))

    with pytest.raises(AssertionError, match="An expert of weight 0 changes nothing"):
        check_method(counts_all)


def test_check_method_finds_methods_that_write_into_arguments_or_fail() -> None:
    def writes(base: Tensor, deltas: Tensor, *, weights: Tensor) -> Tensor:
        return deltas.mul_(weights.view(-1, *[1] * base.ndim)).sum(0) + base

    def fails(base: Tensor, deltas: Tensor, *, weights: Tensor) -> Tensor:
        return base / 0

    with pytest.raises(AssertionError, match="it writes into its arguments"):
        check_method(writes)
    with pytest.raises(AssertionError, match="NumericalError: method fails makes NaN or Inf"):
        check_method(fails)


VALUES = st.floats(-1e10, 1e10, width=32, allow_subnormal=True)


@pytest.mark.parametrize(
    ("name", "options"), [*((m.name, {}) for m in METHODS), *VARIANTS], ids=str
)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(0, 5).flatmap(
        lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=2, max_size=4)
    )
)
def test_finite_input_gives_finite_output_in_any_chunks(
    name: str, options: dict[str, Any], rows: list[list[float]]
) -> None:
    base, *experts = (
        {"a": torch.tensor(row), "b": torch.tensor(row).half()} for row in _clipped(rows)
    )
    inputs = {
        "fisher": [{n: t.float().abs() for n, t in e.items()} for e in experts],
        "gram": [{} for _ in experts],
    }
    ranges = [TimestepRange(0, 250)] * len(experts)
    merged = merge_tensors(base, experts, name, options=options, inputs=inputs, ranges=ranges)
    chunked = merge_tensors(
        base, experts, name, options=options, inputs=inputs, ranges=ranges, chunk=2
    )
    for tensor, same in zip(merged.values(), chunked.values(), strict=True):
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, same)


def _clipped(rows: list[list[float]]) -> list[list[float]]:
    return [[max(-1e3, min(1e3, v)) for v in row] for row in rows]


GOLDEN: list[tuple[str, dict[str, Any], list[list[float]], list[float], list[float]]] = [
    # method, options, deltas on a base of 1, weights, merged
    ("average", {}, [[2, 0], [4, -8]], [1, 3], [4.5, -5]),
    ("task_arithmetic", {"scale": 0.5}, [[2, 0], [4, -8]], [1, 3], [8, -11]),
    # k = 2 of 4: thresholds 3, 5; trimmed [3 -4 0 0] and [5 0 0 6]; no entry is in conflict
    ("ties", {"density": 0.5}, [[3, -4, 1, 2], [5, 1, 2, 6]], [1, 1], [5, -3, 1, 7]),
    # mass [-1 1]: -, +; disjoint means -3 and 2
    ("ties", {"density": 1.0}, [[2, 2], [-3, -1]], [1, 1], [-2, 3]),
    # the first column ties by count, the others elect - and -: the majority decides -
    ("ties", {"density": 1.0, "elect": "count"}, [[2, -2, -1], [-3, -1, 0]], [1, 1], [-2, -0.5, 0]),
    ("ties", {"density": 1.0, "scale": 0.5}, [[2, 2], [2, 2]], [0.3, 0.3], [2, 2]),
    ("dare", {"density": 1.0}, [[2, 0], [4, -8]], [1, 3], [15, -23]),
]


@pytest.mark.parametrize(("name", "options", "deltas", "weights", "expected"), GOLDEN, ids=str)
def test_golden(name: str, options: Any, deltas: Any, weights: Any, expected: Any) -> None:
    base = {"w": torch.ones(len(expected))}
    merged = merge_tensors(
        base,
        [{"w": 1 + torch.tensor(d, dtype=torch.float32)} for d in deltas],
        name,
        weights=weights,
        options=options,
    )
    assert merged["w"].tolist() == expected


def test_golden_fisher() -> None:
    base, experts = (
        {"w": torch.zeros(3)},
        [{"w": torch.tensor([1.0, 2, 4])}, {"w": torch.tensor([3.0, 6, 8])}],
    )
    fishers = [{"w": torch.tensor([1.0, 3, 0])}, {"w": torch.tensor([1.0, 1, 0])}]
    merged = merge_tensors(base, experts, "fisher", weights=[1, 3], inputs={"fisher": fishers})
    assert merged["w"].tolist() == [2.5, 4.0, 7.0]  # (1+9)/4, (6+18)/6, the mean (4+24)/4


@pytest.mark.parametrize(
    ("name", "options"),
    [("fisher", {}), ("regmean", {}), ("range_weighted", {"by": "fisher"})],
    ids=str,
)
def test_a_negative_weight_under_a_divisor_that_may_vanish_is_refused(
    name: str, options: dict[str, Any]
) -> None:
    base, experts = (
        {"w": torch.zeros(2, 2)},
        [{"w": torch.ones(2, 2)}, {"w": torch.full((2, 2), 3.0)}],
    )
    inputs = {"fisher": [{"w": torch.ones(2, 2)}] * 2, "gram": [{"w": torch.eye(2)}] * 2}
    ranges = [TimestepRange(0, 250)] * 2
    with pytest.raises(UsageError, match=r"the weight -0\.9 is negative"):
        merge_tensors(
            base, experts, name, weights=[1, -0.9], options=options, inputs=inputs, ranges=ranges
        )


def test_fisher_normalised_by_the_model_forgets_the_scale_of_each_fisher() -> None:
    base, experts = (
        {"w": torch.zeros(2)},
        [{"w": torch.tensor([1.0, 2])}, {"w": torch.tensor([3.0, 6])}],
    )
    for normalise in ("l2", "layer"):
        fishers = [{"w": torch.tensor([1.0, 1])}, {"w": torch.tensor([100.0, 100])}]
        merged = merge_tensors(
            base, experts, "fisher", options={"normalise": normalise}, inputs={"fisher": fishers}
        )
        torch.testing.assert_close(merged["w"], torch.tensor([2.0, 4.0]))


def test_fisher_smaller_than_float32_still_weighs() -> None:
    experts = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}]
    fishers = [{"w": torch.tensor([1e-38])}, {"w": torch.tensor([3e-38])}]
    merged = merge_tensors(
        {"w": torch.zeros(1)}, experts, "fisher", weights=[1e-6, 1e-6], inputs={"fisher": fishers}
    )
    torch.testing.assert_close(merged["w"], torch.tensor([2.5]))


@pytest.mark.parametrize("density", [0.001, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("few", [0, 50])
def test_thresholds_are_the_exact_kth_magnitudes(
    density: float, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(1)
    deltas = torch.randn(3, 2_000, generator=g) * torch.tensor([[1e-30], [1.0], [1e20]])
    deltas[:, ::7] = deltas[:, 1:2]  # equal magnitudes
    monkeypatch.setattr(selection, "FEW", few)
    blocks = HeldBlocks([Block(d[0], d) for d in deltas.to(dtype).split(666, dim=1)])
    k = max(1, math.floor(density * 2_000))
    oracle = deltas.to(dtype).abs().sort(dim=1, descending=True).values[:, k - 1]
    assert torch.equal(selection.kth_magnitudes(blocks, density=density), oracle)


def test_scope_of_ties_is_the_model_unless_asked() -> None:
    base = {"small": torch.zeros(4), "large": torch.zeros(4)}
    expert = {"small": torch.tensor([1.0, 2, 3, 4]), "large": torch.tensor([10.0, 20, 30, 40])}
    model = merge_tensors(base, [expert], "ties", options={"density": 0.5})
    tensor = merge_tensors(base, [expert], "ties", options={"density": 0.5, "scope": "tensor"})
    assert model["small"].tolist() == [0, 0, 0, 0] and model["large"].tolist() == [10, 20, 30, 40]
    assert tensor["small"].tolist() == [0, 0, 3, 4] and tensor["large"].tolist() == [0, 0, 30, 40]


def test_dare_keeps_the_share_and_the_mean() -> None:
    base, expert = {"w": torch.zeros(100_000)}, {"w": torch.ones(100_000)}
    merged = merge_tensors(base, [expert], "dare", options={"density": 0.25}, weights=[1.0])["w"]
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert abs(float(merged.mean()) - 1) < 0.03
    l1 = merge_tensors(
        base, [expert], "dare", options={"density": 0.25, "rescale": "l1"}, weights=[1.0]
    )["w"]
    assert abs(float(l1.sum()) - 100_000) < 1


def test_dare_masks_depend_on_seed_expert_and_name() -> None:
    base, expert = (
        {"a": torch.zeros(64), "b": torch.zeros(64)},
        {"a": torch.ones(64), "b": torch.ones(64)},
    )
    one = merge_tensors(base, [expert, expert], "dare", weights=[1, 0])
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(
        one["a"], merge_tensors(base, [expert, expert], "dare", weights=[0, 1])["a"]
    )
    assert not torch.equal(
        one["a"], merge_tensors(base, [expert, expert], "dare", weights=[1, 0], seed=1)["a"]
    )
    renamed = merge_tensors({"b": base["b"]}, [{"b": expert["b"]}] * 2, "dare", weights=[1, 0])
    assert torch.equal(one["b"], renamed["b"])


def test_weights_that_sum_to_zero_are_no_mean() -> None:
    base, experts = {"w": torch.zeros(2)}, [{"w": torch.ones(2)}] * 2
    for name in ("average", "fisher"):
        with pytest.raises(UsageError, match="sum to 0"):
            merge_tensors(base, experts, name, weights=[1, -1], inputs={"fisher": experts})


# -- what other programs make of the same ----------------------------------------------------------


def as_mergekit(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """mergekit: exactly k entries, weighted votes, even votes positive, a mean over weights."""
    kept = torch.zeros_like(deltas)
    for row, delta in zip(kept, deltas, strict=True):
        chosen = delta.abs().argsort(descending=True)[: max(1, int(density * delta.numel()))]
        row[chosen] = delta[chosen]
    votes = kept * weights.unsqueeze(1)
    agree = votes.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    divisor = (weights.unsqueeze(1) * agree).sum(0)
    return (votes * agree).sum(0) / torch.where(divisor.abs() < 1e-8, 1, divisor)


def as_peft(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """peft: votes without weights, the weighted sum over the count of those that agree."""
    kept = torch.stack(
        [
            torch.where(d.abs() >= d.abs().topk(int(density * d.numel())).values[-1], d, 0)
            for d in deltas
        ]
    )
    agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1, -1)
    return (kept * weights.unsqueeze(1) * agree).sum(0) / agree.sum(0).clamp_min(1)


def as_authors(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """The authors: k + 1 entries, no weights, even votes as the majority, a mean."""
    n = deltas.shape[1]
    kept = torch.stack(
        [
            torch.where(d.abs() >= d.abs().kthvalue(n - int(density * n)).values, d, 0)
            for d in deltas
        ]
    )
    sign = kept.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = kept * sign > 0
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("preset", "theirs", "weights"),
    [
        ("mergekit", as_mergekit, [0.5, 0.1, 0.7, 0.3]),
        ("peft", as_peft, [0.5, 0.1, 0.7, 0.3]),
        ("authors", as_authors, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_presets_of_ties_do_what_other_programs_do(
    preset: str, theirs: Any, weights: list[float]
) -> None:
    g = torch.Generator().manual_seed(5)
    deltas = torch.randn(4, 5000, generator=g, dtype=torch.float64)
    merged = merge_tensors(
        {"w": torch.zeros(5000, dtype=torch.float64)},
        [{"w": d} for d in deltas],
        "ties",
        weights=weights,
        options={"preset": preset, "density": 0.3},
    )
    expected = theirs(deltas, torch.tensor(weights, dtype=torch.float64), 0.3)
    torch.testing.assert_close(merged["w"], expected, rtol=1e-12, atol=1e-12)


def test_exactly_k_entries_are_kept_of_equal_ones_the_first() -> None:
    base, expert = (
        {"a": torch.zeros(4), "b": torch.zeros(4)},
        {"a": torch.tensor([1.0, 2, 1, 1]), "b": torch.ones(4)},
    )
    options = {"density": 0.5, "keep": "exact", "scope": "model"}
    merged = merge_tensors(base, [expert], "ties", options=options, chunk=3)
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([1, 2, 1, 1], [0, 0, 0, 0])
    with_tensor = merge_tensors(
        base, [expert], "ties", options=options | {"scope": "tensor"}, chunk=3
    )
    assert (with_tensor["a"].tolist(), with_tensor["b"].tolist()) == ([1, 2, 0, 0], [1, 1, 0, 0])


@pytest.mark.gpu
def test_every_method_does_the_same_on_a_gpu() -> None:
    g = torch.Generator().manual_seed(6)
    base = {
        "conv": torch.randn(16, 8, 3, 3, generator=g).half(),
        "bias": torch.randn(16, generator=g).half(),
    }
    experts = [
        {n: (t + 0.01 * torch.randn(t.shape, generator=g)).half() for n, t in base.items()}
        for _ in range(3)
    ]
    inputs = {
        "fisher": [{n: t.float().square() for n, t in e.items()} for e in experts],
        "gram": [{}] * 3,
    }
    for name in all_methods():
        given: dict[str, Any] = {"inputs": inputs, "ranges": [TimestepRange(0, 250)] * 3}
        here, there = (
            merge_tensors(base, experts, name, device=device, **given) for device in ("cpu", "cuda")
        )
        for tensor in base:
            torch.testing.assert_close(
                here[tensor], there[tensor], rtol=1e-3, atol=1e-5, msg=f"{name} {tensor}"
            )
