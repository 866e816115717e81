"""Properties that every merge method has, for the methods here and for those of other packages.

    from demerge.testing import check_method
    def test_my_method():
        check_method(my_method)

Each property takes a method and a seed, merges small random tensors in memory, and raises
AssertionError if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from demerge.merging.contract import Block, Blocks, Method
from demerge.merging.engine.probe import Case
from demerge.merging.engine.resident import load
from demerge.merging.engine.validation import Tensors
from demerge.merging.registry import method_of

SCALES = (0.0, 1e-30, 1e-4, 1.0, 1e10)


@dataclass(frozen=True, slots=True)
class HeldBlocks(Blocks):
    """Blocks in memory, as the statistics of a method see them."""

    blocks: Sequence[Block]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)


def shapes_are_kept(method: Method, seed: int) -> None:
    """The result has the base's names, shapes and dtypes."""
    case = Case.random(seed, K=3)
    merged = case.merge(method)
    assert list(merged) == list(case.base)
    for name, tensor in case.base.items():
        assert merged[name].shape == tensor.shape and merged[name].dtype == tensor.dtype


def arguments_are_kept(method: Method, seed: int) -> None:
    """Nothing that is passed in is changed, and the same call gives the same bits."""
    case, twin = Case.random(seed, K=3), Case.random(seed, K=3)

    @wraps(method.function)
    def watched(*arguments: Tensor, **keywords: Any) -> Tensor:
        tensors = [value for value in keywords.values() if isinstance(value, Tensor)]
        tensors += arguments
        before = [tensor.clone() for tensor in tensors]
        merged = method.function(*arguments, **keywords)
        assert all(map(torch.equal, tensors, before)), "it writes into its arguments"
        return merged

    _assert_equal(case.merge(replace(method, function=watched)), case.merge(method))
    models, twins = ([c.base, *c.experts, *c.inputs] for c in (case, twin))
    for model, other in zip(models, twins, strict=True):
        _assert_equal(model, other)


def zero_deltas_give_the_base(method: Method, seed: int) -> None:
    """Experts equal to the base give the base, to the bit."""
    case = Case.random(seed, K=3)
    _assert_equal(replace(case, experts=[case.base] * 3).merge(method), case.base)


def order_does_not_matter(method: Method, seed: int) -> None:
    """Experts, weights and inputs in another order give the same, up to rounding.

    A method that needs random numbers runs with its neutral options: its masks depend on the order.
    """
    case, turned = Case.random(seed, K=4), Case.random(seed, K=4).pick([2, 0, 3, 1])
    options = (method.neutral_options or {}) if method.needs_random else {}
    _assert_close(case.merge(method, **options), turned.merge(method, **options))


def one_expert_is_itself(method: Method, seed: int) -> None:
    """With its neutral options a single expert of weight 1 is the result, to the bit."""
    case = Case.random(seed, K=1)
    _assert_equal(case.merge(method, **(method.neutral_options or {})), case.experts[0])


def neutral_options_give_the_mean(method: Method, seed: int) -> None:
    """With its neutral options, equal inputs and deltas of one sign, it is the weighted mean."""
    if method.neutral_options is None:
        return
    case = Case.random(seed, K=3)
    experts = [{n: t + (e[n] - t).abs() for n, t in case.base.items()} for e in case.experts]
    alike = replace(case, experts=experts, inputs=[case.inputs[0]] * 3)
    mean = {n: torch.zeros_like(t) for n, t in case.base.items()}
    for weight, expert in zip(case.weights, experts, strict=True):
        mean = {n: t + weight * expert[n] for n, t in mean.items()}
    _assert_close(alike.merge(method, **method.neutral_options), mean)


def weight_zero_is_left_out(method: Method, seed: int) -> None:
    """An expert of weight 0 changes nothing, if the method has weights: the others are merged."""
    if not method.has_weights:
        return
    # random masks depend on the place of an expert: the others keep theirs if the last is left out
    silent = 3 if method.needs_random else 1
    weights = [0.0 if i == silent else 0.2 + 0.1 * i for i in range(4)]
    case = replace(Case.random(seed, K=4), weights=weights)
    others = case.pick([i for i in range(4) if i != silent])
    for options in list(_pairs_of_choices(method))[seed % 3 :: 3]:  # all of them over three seeds
        try:
            _assert_close(case.merge(method, **options), others.merge(method, **options))
        except AssertionError as error:
            raise AssertionError(f"{options or 'default options'}: {error}") from error


def _pairs_of_choices(method: Method) -> Iterator[dict[str, Any]]:
    """Yield the defaults, and all choices of each two options that have choices."""
    chosen = {name: option.choices for name, option in method.options.items() if option.choices}
    chosen[""] = ("",)
    yield {}
    for one, other in combinations(chosen, 2):
        for pair in product(chosen[one], chosen[other]):
            yield {name: choice for name, choice in zip((one, other), pair, strict=True) if name}


def finite_stays_finite(method: Method, seed: int) -> None:
    """Deltas of any scale from 0 to 1e10, identical experts and inputs of 0 give finite numbers."""
    for scale in SCALES:
        case = Case.random(seed, K=3, scale=scale)
        zeros = [{n: torch.zeros_like(t) for n, t in tensors.items()} for tensors in case.inputs]
        alike = replace(case, experts=[case.experts[0]] * 3)
        for variant in (case, replace(case, inputs=zeros), alike):
            assert all(bool(torch.isfinite(t).all()) for t in variant.merge(method).values())


def sessions_follow_the_weights(method: Method, seed: int) -> None:
    """A statistic declared with `uses_weights=False` does not use them: a session keeps it."""
    case = Case.random(seed, K=3)
    job = case.job(method)
    constants = {**job.options, "ranges": job.ranges, "snr": job.snr}
    resident = load(job.reader, constants, torch.device("cpu"), torch.float32)
    for values in ([0.9, 0.05, 0.05], case.weights):
        weights = torch.tensor(values)
        merged = {n: t.clone() for n, _, t in resident.merge(lambda name: weights)}  # noqa: B023
    exact = case.merge(method)
    for name, tensor in merged.items():
        flat = exact[name].reshape(-1)
        torch.testing.assert_close(tensor.to(flat.dtype), flat, rtol=1e-3, atol=1e-4)


Property = Callable[[Method, int], None]
PROPERTIES: tuple[Property, ...] = (
    shapes_are_kept, arguments_are_kept, zero_deltas_give_the_base, order_does_not_matter,
    one_expert_is_itself, neutral_options_give_the_mean, weight_zero_is_left_out,
    finite_stays_finite, sessions_follow_the_weights,
)  # fmt: skip


def check_method(function: Callable[..., Tensor], *, seeds: int = 3) -> None:
    """Run all properties on a method, registered or not.

    Raises:
        AssertionError: naming the property that fails.
    """
    for check in PROPERTIES:
        for seed in range(seeds):
            try:
                check(method_of(function), seed)
            except Exception as error:
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                what = f"{function.__name__}: {check.__doc__} seed {seed}: {kind}{error}"
                raise AssertionError(what) from error


def _assert_equal(one: Tensors, other: Tensors) -> None:
    for name in other:
        assert torch.equal(one[name], other[name]), f"{name} differs"


def _assert_close(one: Tensors, other: Tensors) -> None:
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
