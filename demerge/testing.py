"""Properties that every merge method has, for the methods here and for those of other packages.

    from demerge.testing import check_method
    def test_my_method():
        check_method(my_method)

Each property takes a method and a seed, merges small random tensors in memory, and raises AssertionError where it
fails.
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
    """The result has the base's names, shapes and a floating dtype."""
    case = Case.random(seed, K=3)
    merged = case.merge(method)
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in case.base.items()}
    assert all(t.dtype == torch.float32 for t in merged.values())


def arguments_are_kept(method: Method, seed: int) -> None:
    """Nothing that is passed in is changed, and the same call gives the same bits."""
    case, twin = Case.random(seed, K=3), Case.random(seed, K=3)

    @wraps(method.function)
    def watched(*arguments: Tensor, **given: Any) -> Tensor:
        passed = [*arguments, *(value for value in given.values() if isinstance(value, Tensor))]
        before = [tensor.clone() for tensor in passed]
        merged = method.function(*arguments, **given)
        assert all(map(torch.equal, passed, before)), "it writes into its arguments"
        return merged

    first, second = case.merge(replace(method, function=watched)), case.merge(method)
    _assert_equal(first, second)
    given = [case.base, *case.experts, *case.inputs]
    for mine, kept in zip(given, [twin.base, *twin.experts, *twin.inputs], strict=True):
        _assert_equal(mine, kept)


def zero_deltas_give_the_base(method: Method, seed: int) -> None:
    """Experts equal to the base give the base, to the bit."""
    case = Case.random(seed, K=3)
    _assert_equal(replace(case, experts=[case.base] * 3).merge(method), case.base)


def order_does_not_matter(method: Method, seed: int) -> None:
    """Experts, weights and inputs in another order give the same, up to rounding; random masks are kept out."""
    case, order = Case.random(seed, K=4), [2, 0, 3, 1]
    options = (method.neutral_options or {}) if method.needs_random else {}
    _assert_close(case.merge(method, **options), case.pick(order).merge(method, **options))


def one_expert_is_itself(method: Method, seed: int) -> None:
    """With its options off, as `@method(neutral_options={...})` declares, a single expert of weight 1 is the result, to the bit."""
    case = Case.random(seed, K=1)
    _assert_equal(case.merge(method, **(method.neutral_options or {})), case.experts[0])


def off_is_the_mean(method: Method, seed: int) -> None:
    """A method that says how its options are off is then the weighted mean, for equal inputs and deltas of one sign."""
    if method.neutral_options is None:
        return
    case = Case.random(seed, K=3)
    experts = [{n: t + (e[n] - t).abs() for n, t in case.base.items()} for e in case.experts]
    merged = replace(case, experts=experts, inputs=[case.inputs[0]] * 3).merge(
        method, **method.neutral_options
    )
    mean = {
        n: sum((w * e[n] for w, e in zip(case.weights, experts, strict=True)), torch.zeros(()))
        for n in case.base
    }
    _assert_close(merged, mean)


def weight_zero_is_left_out(method: Method, seed: int) -> None:
    """An expert of weight 0 changes nothing, with any two choices, if the method has weights: the others are merged."""
    if not method.has_weights:
        return
    silent = (
        3 if method.needs_random else 1
    )  # random masks depend on the place of an expert: so the others keep theirs
    case = replace(
        Case.random(seed, K=4), weights=[0.0 if i == silent else 0.2 + 0.1 * i for i in range(4)]
    )
    others = case.pick([i for i in range(4) if i != silent])
    for options in list(_pairs_of_choices(method))[seed % 3 :: 3]:  # all of them over three seeds
        try:
            _assert_close(case.merge(method, **options), others.merge(method, **options))
        except AssertionError as error:
            raise AssertionError(f"{options or 'default options'}: {error}") from error


def _pairs_of_choices(method: Method) -> Iterator[dict[str, Any]]:
    """Yield the defaults, and all choices of each two options that have choices."""
    chosen = [
        [(name, choice) for choice in option.choices]
        for name, option in method.options.items()
        if option.choices
    ]
    yield {}
    for one, other in combinations([*chosen, [("", "")]], 2):
        yield from ({name: choice for name, choice in pair if name} for pair in product(one, other))


def finite_stays_finite(method: Method, seed: int) -> None:
    """Deltas of any scale from 0 to 1e10, identical experts and inputs of 0 give finite numbers."""
    for scale in SCALES:
        case = Case.random(seed, K=3, scale=scale)
        silent = replace(
            case, inputs=[{n: torch.zeros_like(t) for n, t in i.items()} for i in case.inputs]
        )
        for variant in (case, silent, replace(case, experts=[case.experts[0]] * 3)):
            assert all(bool(torch.isfinite(t).all()) for t in variant.merge(method).values())


Property = Callable[[Method, int], None]
PROPERTIES: tuple[Property, ...] = (
    shapes_are_kept,
    arguments_are_kept,
    zero_deltas_give_the_base,
    order_does_not_matter,
    one_expert_is_itself,
    off_is_the_mean,
    weight_zero_is_left_out,
    finite_stays_finite,
)


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
                what = (
                    error
                    if isinstance(error, AssertionError)
                    else f"{type(error).__name__}: {error}"
                )
                raise AssertionError(
                    f"{function.__name__}: {check.__doc__} seed {seed}: {what}"
                ) from error


def _assert_equal(one: Tensors, other: Tensors) -> None:
    for name in other:
        assert torch.equal(one[name], other[name]), f"{name} differs"


def _assert_close(one: Tensors, other: Tensors) -> None:
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
