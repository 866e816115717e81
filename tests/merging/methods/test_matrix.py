"""The methods that see weights as matrices: golden lines by hand, and the papers' algorithms by
torch.linalg.svd and lstsq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demerge.errors import InputError, UsageError
from demerge.merging import merge_tensors
from demerge.merging.methods.shared.spectral import as_matrix, polar, solve, thin_svd

Matrix = list[list[float]]


def diagonal(*values: float) -> Matrix:
    return torch.diag(torch.tensor(values, dtype=torch.float64)).tolist()


# -- worked out by hand ----------------------------------------------------------------------------

GOLDEN: list[tuple[str, dict[str, Any], list[Matrix], list[float], Matrix]] = [
    # method, options, deltas on a base of 0, weights, merged
    # r = 1: 4 e1 e1' and 3 e2 e2', orthogonal as they are
    ("tsv", {}, [diagonal(4, 1), diagonal(2, 3)], [1, 1], diagonal(4, 3)),
    # both lead with e1: polar([e1 e1]) = [e1 e1] / sqrt 2 on both sides, (4 + 3) / 2; c = 1, 0.5
    # then (4 + 1.5) / 2
    ("tsv", {}, [diagonal(4, 1), diagonal(3, 2)], [1, 1], diagonal(3.5, 0)),
    ("tsv", {"scale": 2}, [diagonal(4, 1), diagonal(3, 2)], [2, 1], diagonal(5.5, 0)),
    # the sum is diag(5, -3), its mean singular value 4
    ("iso_c", {}, [diagonal(4, -1), diagonal(1, -2)], [1, 1], diagonal(4, -4)),
    (
        "iso_c",
        {"scale": 0.5},
        [diagonal(4, -1), diagonal(2, -4)],
        [1, 0.5],
        diagonal(2, -2),
    ),  # diag(5, -3) again
    # sum diag(12 8 4 1 3); 3 common dimensions; beyond them the experts lead with 2 at e4 and 3 at
    # e5: 29 / 5
    (
        "iso_cts",
        {"common": 0.6},
        [diagonal(6, 4, 2, 2, 0), diagonal(6, 4, 2, -1, 3)],
        [1, 1],
        diagonal(*[5.8] * 5),
    ),
    (
        "iso_cts",
        {"common": 1},
        [diagonal(6, 4, 2, 2, 0), diagonal(6, 4, 2, -1, 3)],
        [1, 1],
        diagonal(*[5.6] * 5),
    ),
    # U = [[.6 -.8] [.8 .6]], S V_i' = diag(4, 1) and diag(2, -3): means 3 and -3, the mass of the
    # latter being negative
    (
        "knots",
        {"density": 1},
        [[[2.4, -0.8], [3.2, 0.6]], [[1.2, 2.4], [1.6, -1.8]]],
        [1, 1],
        [[1.8, 2.4], [2.4, -1.8]],
    ),
    # k = 1 of 4: 4 and -3 alone are kept
    (
        "knots",
        {"density": 0.25},
        [[[2.4, -0.8], [3.2, 0.6]], [[1.2, 2.4], [1.6, -1.8]]],
        [1, 1],
        [[2.4, 2.4], [3.2, -1.8]],
    ),
    (
        "knots",
        {"then": "dare", "density": 1},
        [diagonal(4, 1), diagonal(2, -3)],
        [1, 2],
        diagonal(8, -5),
    ),
    # nuclear norms 4 and 8, of which 3 and 6 are the least kept: times 4/3 each, then the mean
    ("star", {"eta": 0.5}, [diagonal(3, 1), diagonal(2, 6)], [0.5, 0.5], diagonal(2, 4)),
    ("star", {"eta": 0.8}, [diagonal(3, 1), diagonal(2, 6)], [1, 1], diagonal(5, 7)),
    # tau C = (2 1) with C = [[1.5 .5] [.5 .5]], in the first row; the second is free, its least
    # norm 0
    ("wudi", {}, [[[1, 0], [0, 0]], [[1, 1], [0, 0]]], [1, 1], [[1, 1], [0, 0]]),
    # c = 1, 0.5: tau (C_1 + C_2 / 4) = tau_1 C_1 + tau_2 C_2 / 8; the norms are sqrt(2 1) and all
    # rows are e1
    ("wudi", {}, [[[2, 0], [0, 0]], [[6, 0], [0, 0]]], [2, 1], [[2.2, 0], [0, 0]]),
]


@pytest.mark.parametrize(("name", "options", "deltas", "weights", "expected"), GOLDEN, ids=str)
def test_golden(name: str, options: Any, deltas: Any, weights: Any, expected: Any) -> None:
    merged = merge_of(
        [torch.tensor(d, dtype=torch.float32) for d in deltas], name, weights, **options
    )
    torch.testing.assert_close(
        merged, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6
    )


def test_golden_regmean() -> None:
    deltas = [torch.tensor([[2.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 6.0], [8.0, 8.0]])]
    silent = [torch.tensor(diagonal(1, 0)), torch.tensor(diagonal(3, 0))]
    merged = merge_of(deltas, "regmean", [1, 1], gram=silent)
    assert merged.tolist() == [
        [3.5, 4],
        [6, 4],
    ]  # (2 + 12) / 4, 24 / 4; the second input was never seen: the mean
    full = [torch.tensor([[2.0, 2.0], [2.0, 4.0]]), torch.tensor([[1.0, -2.0], [-2.0, 5.0]])]
    # sum G = [[3 0] [0 9]]; (2 2) G_1 = (8 12), (4 6) G_2 = (-8 22); (8 8) G_2 = (-8 24)
    expected = torch.tensor([[0.0, 34 / 9], [-8 / 3, 24 / 9]])
    torch.testing.assert_close(merge_of(deltas, "lot", [1, 1], gram=full, alpha=1), expected)
    # weights 1, 2 on the diagonals alone: (4 + 8) / 4, (8 + 60) / 14; 16 / 4, 80 / 14
    expected = torch.tensor([[3.0, 68 / 14], [4.0, 80 / 14]])
    torch.testing.assert_close(merge_of(deltas, "regmean", [1, 2], gram=full, alpha=0), expected)


def merge_of(
    deltas: list[Tensor],
    name: str,
    weights: list[float] | None = None,
    gram: list[Tensor] | None = None,
    **options: Any,
) -> Tensor:
    base = torch.zeros_like(deltas[0])
    inputs = None if gram is None else {"gram": [{"w": g} for g in gram]}
    experts = [{"w": base + d} for d in deltas]
    return merge_tensors(
        {"w": base}, experts, name, weights=weights, options=options, inputs=inputs
    )["w"]


# -- the papers' algorithms, by LAPACK in float64 --------------------------------------------------


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    U, _, Vh = svd(matrix)
    return U @ Vh


def tsv(taus: list[Tensor]) -> Tensor:
    r = max(1, min(taus[0].shape) // len(taus))
    triples = [svd(tau) for tau in taus]
    U = nearest_orthogonal(torch.cat([U[:, :r] for U, _, _ in triples], 1))
    V = nearest_orthogonal(torch.cat([Vh[:r] for _, _, Vh in triples]))
    return U @ torch.diag(torch.cat([S[:r] for _, S, _ in triples])) @ V


def iso_c(taus: list[Tensor]) -> Tensor:
    U, S, Vh = svd(torch.stack(taus).sum(0))
    return U @ torch.diag(torch.full_like(S, float(S.mean()))) @ Vh


def iso_cts(taus: list[Tensor]) -> Tensor:
    K, size = len(taus), min(taus[0].shape)
    s = round((size - int(0.8 * size)) / K)
    U, S, Vh = (
        part[..., : size - K * s] if i < 2 else part[: size - K * s]
        for i, part in enumerate(svd(sum_of(taus)))
    )
    own = [svd(tau - U @ U.T @ tau) for tau in taus]
    left = nearest_orthogonal(torch.cat([*(u[:, :s] for u, _, _ in own), U], 1))
    right = nearest_orthogonal(torch.cat([*(v[:s] for _, _, v in own), Vh]))
    return torch.cat([*(x[:s] for _, x, _ in own), S]).mean() * left @ right


def star(taus: list[Tensor]) -> Tensor:
    merged = torch.zeros_like(taus[0])
    for tau in taus:
        U, S, Vh = svd(tau)
        r = next(r for r in range(1, len(S) + 1) if S[:r].sum() >= 0.4 * S.sum())
        merged += U[:, :r] @ torch.diag(S[:r] * S.sum() / S[:r].sum()) @ Vh[:r] / len(taus)
    return merged


def knots(taus: list[Tensor]) -> Tensor:
    U, S, Vh = svd(torch.cat(taus, 1))
    aligned = torch.stack([S[:, None] * V for V in Vh.split(taus[0].shape[1], dim=1)])
    k = max(1, int(0.2 * aligned[0].numel()))
    bound = aligned.abs().flatten(1).sort(1, descending=True).values[:, k - 1].view(-1, 1, 1)
    kept = aligned * (aligned.abs() >= bound * (1 - 1e-9))
    agree = kept * kept.sum(0).sign() > 0
    return U @ ((kept * agree).sum(0) / agree.sum(0).clamp_min(1))


def wudi(taus: list[Tensor]) -> Tensor:
    C = [tau.T @ tau / tau.square().sum() for tau in taus]
    right = sum_of([tau @ C_i for tau, C_i in zip(taus, C, strict=True)])
    return right @ torch.linalg.pinv(sum_of(C), rtol=1e-11, hermitian=True)


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


ORACLES = {oracle.__name__: oracle for oracle in (tsv, iso_c, iso_cts, star, knots, wudi)}
SHAPES = [(6, 20), (20, 6), (9, 9), (2, 5), (5, 3, 3, 3), (7, 3, 3)]


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("K", [2, 4])
def test_the_paper_by_lapack(name: str, shape: tuple[int, ...], K: int) -> None:
    g = torch.Generator().manual_seed(K)
    deltas = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(K)]
    expected = ORACLES[name]([d.flatten(1) for d in deltas]).view(shape)
    torch.testing.assert_close(merge_of(deltas, name), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "wudi"])
@pytest.mark.parametrize("weights", [[1.0], [3.0], [0.0, 0.5, 0.0]], ids=str)
def test_an_expert_alone_is_the_result(name: str, weights: list[float]) -> None:
    deltas = [
        torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(i))
        for i in range(len(weights))
    ]
    alone = deltas[max(range(len(weights)), key=lambda i: weights[i])]
    assert torch.equal(merge_of(deltas, name, weights), alone)
    still = [*deltas, torch.zeros_like(alone)]
    assert torch.equal(merge_of(still, name, [*weights, max(weights)]), alone)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "wudi"])
def test_weights_are_relative_and_scale_is_the_length(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    deltas = [torch.randn(5, 12, generator=g, dtype=torch.float64) for _ in range(3)]
    merged = merge_of(deltas, name, [0.2, 0.1, 0.3])
    torch.testing.assert_close(merge_of(deltas, name, [2.0, 1.0, 3.0]), merged)
    torch.testing.assert_close(merge_of(deltas, name, [2.0, 1.0, 3.0], scale=0.5), merged / 2)
    vectors = [d[:, 0] for d in deltas]
    expected = (2 * vectors[0] + vectors[1] + 3 * vectors[2]) / 6
    torch.testing.assert_close(merge_of(vectors, name, [2.0, 1.0, 3.0]), expected)
    torch.testing.assert_close(
        merge_of([v[:, None] for v in vectors], name, [2.0, 1.0, 3.0]), expected[:, None]
    )


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "knots", "star", "wudi"])
@pytest.mark.parametrize("scale", [1e-40, 3e37])
def test_any_scale_is_the_same_merge(name: str, scale: float) -> None:
    g = torch.Generator().manual_seed(4)
    deltas = [torch.randn(5, 12, generator=g, dtype=torch.float64) for _ in range(3)]
    merged = merge_of([scale * d for d in deltas], name)
    torch.testing.assert_close(merged / scale, merge_of(deltas, name), rtol=1e-6, atol=1e-7)


ENTRIES = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.3, 1e-7, 1e-45, -1e-30, 1e10, -3e37])


@pytest.mark.parametrize(
    ("name", "options"),
    [*((n, {}) for n in [*ORACLES, "regmean"]), ("knots", {"then": "dare"})],
    ids=str,
)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_finite_matrices_give_finite_matrices(
    name: str, options: dict[str, Any], K: int, m: int, n: int, data: Any
) -> None:
    """Zeros, equal rows, rank 1, entries of all scales; the base where no expert moved."""
    rows = data.draw(st.lists(ENTRIES, min_size=K * m * n, max_size=K * m * n))
    deltas = torch.tensor(rows).view(K, m, n)
    gram = [d.T @ (d / d.abs().amax().clamp_min(1)) for d in deltas] if name == "regmean" else None
    merged = merge_of(list(deltas), name, gram=gram, **options)
    assert torch.isfinite(merged).all()
    assert deltas.any() or not merged.any()


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "knots", "star", "wudi"])
def test_experts_of_low_rank_stay_in_their_span(name: str) -> None:
    """What an SVD invents for singular values of 0 does not reach the result."""
    g = torch.Generator().manual_seed(5)
    left, right = torch.randn(9, 2, generator=g), torch.randn(2, 30, generator=g)
    deltas = [
        left @ torch.diag(torch.tensor(d)) @ right for d in ([1.0, 3.0], [2.0, 0.0], [4.0, -1.0])
    ]
    merged = merge_of(deltas, name).double()
    assert merged.abs().sum() > 1
    inside = nearest_orthogonal(left.double())
    torch.testing.assert_close(inside @ inside.T @ merged, merged, rtol=1e-4, atol=1e-5)


def test_equal_experts_give_tsv_one_of_them_cut_to_its_rank() -> None:
    delta = torch.randn(6, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    U, S, Vh = svd(delta)
    torch.testing.assert_close(
        merge_of([delta, delta], "tsv"), U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
    )


def test_wudi_between_the_sum_and_the_solution() -> None:
    g = torch.Generator().manual_seed(7)
    for shape in ((3, 20), (20, 3)):
        deltas = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
        torch.testing.assert_close(
            merge_of(deltas, "wudi", ridge=1e6), sum_of(deltas), rtol=1e-4, atol=1e-4
        )
        ridged = [merge_of(deltas, "wudi", ridge=r) - sum_of(deltas) for r in (0.0, 1.0, 10.0)]
        assert ridged[0].norm() > ridged[1].norm() > ridged[2].norm() > 0


def test_wudi_of_experts_that_share_no_inputs_is_their_sum() -> None:
    g = torch.Generator().manual_seed(8)
    deltas = [torch.zeros(3, 20, dtype=torch.float64) for _ in range(2)]
    deltas[0][:, :10], deltas[1][:, 10:] = (
        torch.randn(3, 10, generator=g),
        torch.randn(3, 10, generator=g),
    )
    torch.testing.assert_close(merge_of(deltas, "wudi"), sum_of(deltas))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_regmean_is_the_least_squares_solution(shape: tuple[int, ...], K: int) -> None:
    g = torch.Generator().manual_seed(K)
    deltas = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(K)]
    inputs = [torch.randn(40, shape[1], generator=g, dtype=torch.float64) for _ in range(K)]
    outputs = torch.cat([x @ d.flatten(1).T for x, d in zip(inputs, deltas, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T.reshape(shape)
    merged = merge_of(deltas, "regmean", gram=[x.T @ x for x in inputs], alpha=1)
    torch.testing.assert_close(merged, expected)


def test_regmean_without_gram_is_the_mean_and_a_gram_that_does_not_fit_is_refused() -> None:
    deltas = [torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    base = {"w": torch.zeros_like(deltas[0])}
    experts = [{"w": d} for d in deltas]
    merged = merge_tensors(base, experts, "regmean", weights=[1, 3], inputs={"gram": [{}, {}]})
    torch.testing.assert_close(merged["w"], (deltas[0] + 3 * deltas[1]) / 4)
    with pytest.raises(InputError, match="Gram matrices do not fit"):
        merge_of(deltas, "regmean", gram=[torch.eye(3)] * 2)
    with pytest.raises(InputError, match="NaN"):
        merge_of(deltas, "regmean", gram=[torch.full((27, 27), float("nan"))] * 2)
    with pytest.raises(UsageError, match="the weight -1 is negative"):
        merge_of(deltas, "regmean", [1, -1], gram=[torch.eye(27)] * 2)


# -- the shared parts ------------------------------------------------------------------------------


def test_views_as_matrices() -> None:
    assert as_matrix(torch.zeros(4, 3, 2, 2)).shape == (4, 12)
    assert as_matrix(torch.zeros(5)).shape == (1, 5) and as_matrix(torch.zeros(())).shape == (1, 1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(-6, 0),
    st.integers(-35, 35),
    st.integers(0, 99),
)
def test_thin_svd_is_lapacks(
    m: int, n: int, rank: int, smallest: int, scale: int, seed: int
) -> None:
    """For any shape, rank, spectrum down to 1e-6, and scale."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n, rank)
    left, right = (
        nearest_orthogonal(torch.randn(k, r, generator=g, dtype=torch.float64)) for k in (m, n)
    )
    spectrum = 10.0**scale * torch.logspace(0, smallest, r, dtype=torch.float64)
    matrix = left @ torch.diag(spectrum) @ right.T
    U, S, Vh = thin_svd(matrix)
    assert U.shape == (m, r) and Vh.shape == (r, n)
    torch.testing.assert_close(S, spectrum, rtol=1e-6, atol=0)
    torch.testing.assert_close(U @ torch.diag(S) @ Vh, matrix, rtol=0, atol=1e-12 * 10.0**scale)
    for frame in (U.T, Vh):
        torch.testing.assert_close(
            frame @ frame.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-6
        )
    if smallest:
        torch.testing.assert_close(polar(matrix), left @ right.T, rtol=0, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 99))
def test_solve_is_the_pseudo_inverse(n: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, min(n, rank), generator=g, dtype=torch.float64)
    gram, right = factor @ factor.T, torch.randn(3, n, generator=g, dtype=torch.float64)
    expected = right @ torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
    torch.testing.assert_close(solve(right, gram, 1e-10), expected, rtol=1e-5, atol=1e-6)


def test_the_polar_factor_differentiates_where_singular_values_are_equal() -> None:
    g = torch.Generator().manual_seed(3)
    M = torch.randn(5, 3, generator=g, dtype=torch.float64)
    for matrix in (M, M.T, torch.linalg.qr(M).Q):
        assert torch.autograd.gradcheck(polar, matrix.clone().requires_grad_())


def test_merges_differentiate_in_their_weights() -> None:
    g = torch.Generator().manual_seed(9)
    from demerge.merging.methods import iso, knots, star, tsv, wudi

    base, deltas = (
        torch.zeros(3, 5, dtype=torch.float64),
        torch.randn(3, 3, 5, generator=g, dtype=torch.float64),
    )
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    merges: list[Callable[[Tensor], Tensor]] = [
        lambda w: tsv.tsv(base, deltas, weights=w),
        lambda w: iso.iso_c(base, deltas, weights=w),
        lambda w: iso.iso_cts(base, deltas, weights=w, common=0.2),  # one dimension to each expert
        lambda w: star.star(base, deltas, weights=w),
        lambda w: wudi.wudi(base, deltas, weights=w),
        lambda w: knots.knots(base, deltas, weights=w, uniform=torch.zeros(3, 3, 5)),
    ]
    for merge in merges:
        assert torch.autograd.gradcheck(merge, (weights,), atol=1e-5)
