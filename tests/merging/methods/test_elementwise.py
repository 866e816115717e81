"""The methods entry by entry: lines computed by hand, slow oracles in float64, and the edges of
each formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demerge.errors import UsageError
from demerge.merging import merge_tensors
from demerge.merging.contract import Block
from demerge.merging.engine import job
from demerge.merging.engine.in_memory import assemble
from demerge.merging.engine.job import MergeJob
from demerge.merging.engine.reader import uniform
from demerge.merging.methods.della import probabilities, prune
from demerge.merging.methods.karcher import direction
from demerge.merging.methods.shared.geometry import cosines, gram, norm_ratio, row_grams
from demerge.merging.registry import find_method
from demerge.randomness import key_of
from demerge.testing import HeldBlocks
from demerge.timesteps import TimestepRange

Rows = np.ndarray[Any, np.dtype[np.float64]]  # the deltas of one tensor [K n]
SHAPES = {"conv": (4, 3, 3, 3), "linear": (6, 7), "bias": (5,), "one": (1, 1), "empty": (0, 3)}
HALVES = [TimestepRange(0, 250), TimestepRange(250, 1000)]

GOLDEN: list[tuple[str, dict[str, Any], list[list[float]], list[float], list[float]]] = [
    # method, options, deltas on a base of 1, weights, merged
    ("magmax", {}, [[2, -1, 3], [-4, 1, -3]], [1, 1], [-3, 2, 4]),
    (
        "magmax",
        {"scale": 2},
        [[2, -1, 3], [-8, 1, -3]],
        [3, 1.5],
        [-7, -1, 7],
    ),  # relative: 1 and 0.5
    # merged task vector [4 0 4]; needed by both, both (of nothing), the first alone
    ("consensus", {"threshold": 0.5}, [[2, 2, 4], [2, -2, 0]], [1, 1], [5, 1, 1]),
    ("consensus", {"threshold": 0.5, "k": 1}, [[2, 2, 4], [2, -2, 0]], [1, 1], [5, 1, 5]),
    ("consensus", {"threshold": 3}, [[2, 2, 4], [2, -2, 0]], [1, 1], [1, 1, 1]),
    # four that agree need it, for each threshold below 1; against their sum, as in the paper, none
    # does
    ("consensus", {"k": 4}, [[2, -2]] * 4, [1, 1, 1, 1], [9, -7]),
    ("consensus", {"preset": "paper"}, [[2, -2]] * 4, [1, 1, 1, 1], [1, 1]),
    # disjoint means [2 2 4], the even column by the majority +
    ("consensus", {"of": "ties", "density": 1, "k": 2}, [[2, 2, 4], [2, -2, 0]], [1, 1], [3, 3, 1]),
    # n = 8, k = 4, t = 2: ranks 3 to 6 stay
    (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.25},
        [[8, -7, 6, -5, 4, 3, 2, 1]],
        [1],
        [1, 1, 7, -4, 5, 4, 1, 1],
    ),
    # of equal magnitudes the first ones rank first
    (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.25},
        [[3, 3, 3, 3, 1, 1, 1, 1]],
        [1],
        [1, 1, 4, 4, 2, 2, 1, 1],
    ),
    (
        "breadcrumbs",
        {"density": 0.01, "gamma": 0.01},
        [[1, 2, 3]],
        [1],
        [1, 1, 4],
    ),  # a small tensor keeps an entry
    (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0, "rescale": "l1"},
        [[5, 0, 3, 2]],
        [1],
        [7.25, 1, 4.75, 1],
    ),
    (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0, "then": "ties"},
        [[4, 1], [-6, 2]],
        [1, 1],
        [-5, 1],
    ),
    # energies 6 and 18; the sums of the other columns are 0, so positive
    ("sce", {"density": 1}, [[2, 1, 1], [4, -1, -1]], [1, 1], [4.5, 2, 2]),
    # deviations [2 0 2 0], k = 1 of 2: both equal ones are kept
    ("sce", {"density": 0.5}, [[4, 0, 2, 1], [0, 0, -2, 1]], [1, 1], [5, 1, 3, 1]),
    # k = 2 of 4: the entry at the threshold has s = 0
    ("pcb", {"density": 0.5, "clip": 0}, [[1, -2, 3, -4]], [1], [1, 1, 1, -3]),
    # the largest score of each: its second entry, its first
    ("pcb", {"density": 0.5, "clip": 0}, [[1, 2], [3, 1]], [1, 1], [4, 3]),
    (
        "pcb",
        {"density": 1, "clip": 0.25, "balance": "none"},
        [[1, 2, 3, 9]],
        [1],
        [3, 3, 4, 4],
    ),  # clipped to [2, 3]
    # c = 0.6: t = 1.2 / 1.6 times the mean [0.8 0.4]
    ("model_stock", {}, [[1, 0], [0.6, 0.8]], [1, 1], [1.6, 1.3]),
    ("model_stock", {}, [[1, 0], [-1, 0]], [1, 1], [1, 1]),
    (
        "model_stock",
        {},
        [[1, 0], [1, 0], [0, 7]],
        [1, 1, 0],
        [2, 1],
    ),  # weight 0: as if it were not there
    ("slerp", {}, [[2, 0], [0, 4]], [1, 1], [1 + 3 / math.sqrt(2)] * 2),
    ("slerp", {"norm": "geometric"}, [[2, 0], [0, 8]], [1, 1], [1 + 4 / math.sqrt(2)] * 2),
    (
        "slerp",
        {"norm": "own"},
        [[2, 0], [0, 4]],
        [1, 1],
        [1 + 2 / math.sqrt(2), 1 + 4 / math.sqrt(2)],
    ),
    ("slerp", {}, [[2, 0], [-4, 0]], [1, 1], [1, 1]),  # opposite: no mean
    (
        "slerp",
        {},
        [[2, 0], [-4, 0]],
        [3, 1],
        [3.5, 1],
    ),  # the second does not move the direction, but the length
    ("slerp", {}, [[2, 0], [0, 0]], [1, 1], [2, 1]),  # a zero delta has no direction, but a length
    ("slerp", {}, [[2, 0], [0, -4]], [1, -1], [1 + 3 / math.sqrt(2)] * 2),  # turned round
    ("della", {"density": 1, "epsilon": 0, "then": "linear"}, [[2, 0], [4, -8]], [1, 3], [15, -23]),
    ("della", {"density": 1, "epsilon": 0}, [[2, 2], [-3, -1]], [1, 1], [-2, 3]),
    ("range_weighted", {}, [[4, 0], [0, 4]], [1, 1], [2, 4]),
    ("range_weighted", {"scale": 2}, [[4, 0], [0, 4]], [3, 1], [5, 5]),
    # cosine 0.6 for both: only the mass tells them apart
    ("range_weighted", {"by": "conflict"}, [[4, 0], [2.4, 3.2]], [1, 1], [3.8, 3.4]),
]


@pytest.mark.parametrize(("name", "options", "deltas", "weights", "expected"), GOLDEN, ids=str)
def test_golden(name: str, options: Any, deltas: Any, weights: Any, expected: Any) -> None:
    experts = [{"w": 1 + torch.tensor(delta, dtype=torch.float32)} for delta in deltas]
    base = {"w": torch.ones(len(expected))}
    merged = merge_tensors(base, experts, name, weights=weights, options=options, ranges=HALVES)
    torch.testing.assert_close(
        merged["w"], torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6
    )


# -- oracles: tau [*] of the merged tensor, from its deltas [K n] in float64 -----------------------


def relative(weights: Rows) -> Rows:
    return weights / np.abs(weights).max()


def magmax(deltas: Rows, weights: Rows) -> Rows:
    weighed = relative(weights)[:, None] * deltas
    return weighed[np.abs(weighed).argmax(0), np.arange(deltas.shape[1])]


def consensus(
    deltas: Rows, weights: Rows, threshold: float = 0.4, k: int = 2, others: str = "mean"
) -> Rows:
    merged = relative(weights) @ deltas
    n = max(1, len(weights) - 1) if others == "mean" else 1
    masks = [np.abs(delta) > threshold * np.abs(merged - delta) / n for delta in deltas]
    return (weights @ deltas) * (sum(m.astype(int) for m in masks) >= min(k, len(weights)))


def crumbs(delta: Rows, density: float, gamma: float) -> Rows:
    n = len(delta)
    k = max(1, math.floor(density * n))
    t = min(math.floor(gamma * n), n - k)
    kept = sorted(range(n), key=lambda j: (-abs(delta[j]), j))[t : t + k]
    return np.array([value if j in set(kept) else 0.0 for j, value in enumerate(delta)])


def breadcrumbs(deltas: Rows, weights: Rows, density: float = 0.15, gamma: float = 0.01) -> Rows:
    return weights @ np.array([crumbs(delta, density, gamma) for delta in deltas])


def sce(deltas: Rows, weights: Rows, density: float = 0.1) -> Rows:
    spread = np.zeros(deltas.shape[1])
    for a, b in itertools.product(
        deltas, deltas
    ):  # the variance is the mean of the squared differences, halved
        spread += (a - b) ** 2
    varying = np.sort(spread[spread > 0])[::-1]
    kept = deltas * (
        spread >= (varying[max(1, math.floor(density * len(varying))) - 1] if len(varying) else 0)
    )
    energy, sign = (kept**2).sum(1), np.where(weights @ kept >= 0, 1, -1)
    result = np.zeros(deltas.shape[1])
    for j in range(deltas.shape[1]):
        agreeing = [i for i in range(len(weights)) if weights[i] * kept[i, j] * sign[j] > 0]
        if agreeing:
            c = energy[agreeing]
            result[j] = (
                (c * weights[agreeing]) @ kept[agreeing, j] / (c * np.abs(weights[agreeing])).sum()
            )
    return result


def pcb(deltas: Rows, weights: Rows, density: float = 0.1, clip: float = 1e-4) -> Rows:
    K, n = deltas.shape
    ordered, r = np.sort(np.abs(deltas), axis=1), relative(weights)
    low, high = ordered[:, [math.floor(clip * n)]], ordered[:, [n - 1 - math.floor(clip * n)]]
    size = np.clip(np.abs(deltas), low, high)
    unit = (size - low) / np.where(high > low, high - low, 1)
    p = np.exp(K * unit**2) * np.tanh(r[:, None] * deltas * (r @ deltas))
    q = np.sort(p, axis=1)[:, [math.floor(n * (1 - density))]]
    top = p.max(1, keepdims=True)
    s = np.where(top > q, (np.maximum(p, q) - q) / np.where(top > q, top - q, 1), p >= q)
    mass = np.abs(weights) @ s
    return (weights @ (s * np.sign(deltas) * size)) / np.where(mass > 0, mass, 1)


def stock_ratio(deltas: Rows, weights: Rows) -> float:
    pairs = list(itertools.combinations(range(len(weights)), 2))
    if not pairs:
        return 1.0
    angles = [
        deltas[i] @ deltas[j] / (np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j]))
        for i, j in pairs
    ]
    c = np.average(angles, weights=[abs(weights[i] * weights[j]) for i, j in pairs])
    N = weights.sum() ** 2 / (weights**2).sum()
    return float(N * c / (1 + (N - 1) * c))


def model_stock(deltas: Rows, weights: Rows) -> Rows:
    return stock_ratio(deltas, weights) * (weights @ deltas) / weights.sum()


def karcher(deltas: Rows, weights: Rows) -> Rows:
    lengths, w = np.linalg.norm(deltas, axis=1), weights / weights.sum()
    points = deltas / lengths[:, None]
    u = w @ points / np.linalg.norm(w @ points)
    for _ in range(200):
        angles = np.arccos(np.clip(points @ u, -1, 1))
        pulls = [
            a * x / np.sin(a) if a > 1e-9 else x
            for a, x in zip(angles, points - np.outer(points @ u, u), strict=True)
        ]
        step = w @ np.array(pulls)
        length = np.linalg.norm(step)
        u = np.cos(length) * u + (np.sin(length) * step / length if length > 0 else 0)
        u /= np.linalg.norm(u)
    return (w @ lengths) * u


def range_weighted(deltas: Rows, weights: Rows) -> Rows:
    v = weights * np.array([len(r) for r in ranges_of(len(weights))])
    return v @ deltas / v.sum()


ORACLES: dict[str, Callable[..., Rows]] = {
    "magmax": magmax,
    "consensus": consensus,
    "breadcrumbs": breadcrumbs,
    "sce": sce,
    "pcb": pcb,
    "model_stock": model_stock,
    "slerp": karcher,
    "range_weighted": range_weighted,
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ORACLES),
    ("consensus", {"threshold": 0.7, "k": 1}),
    ("consensus", {"others": "sum"}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.2}),
    ("sce", {"density": 0.5}),
    ("pcb", {"density": 0.6, "clip": 0.1}),
]


def ranges_of(K: int) -> list[TimestepRange]:
    return [TimestepRange(i * 200, i * 200 + 50 * (i + 1)) for i in range(K)]


def drawn(
    seed: int, K: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[float]]:
    """Return base, experts and weights; 16-bit ones have many equal deltas."""
    g = torch.Generator().manual_seed(seed)
    base = {n: (0.3 * torch.randn(s, generator=g)).to(dtype) for n, s in SHAPES.items()}
    common = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    experts = [
        {
            n: (t.double() + 0.05 * (common[n] + torch.randn(t.shape, generator=g))).to(dtype)
            for n, t in base.items()
        }
        for _ in range(K)
    ]
    return base, experts, [0.2 + float(torch.rand((), generator=g)) for _ in range(K)]


def deltas_of(base: Tensor, experts: Sequence[Tensor]) -> Rows:
    return np.stack([(e.double() - base.double()).flatten().numpy() for e in experts])


@pytest.mark.parametrize(
    ("K", "dtype"), [(1, torch.float32), (3, torch.float16), (4, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_oracle(name: str, options: dict[str, Any], K: int, dtype: torch.dtype) -> None:
    base, experts, weights = drawn(K, K, dtype)
    asked = {**options, "scope": "tensor"} if name == "pcb" else options
    merged = merge_tensors(
        base, experts, name, weights=weights, options=asked, ranges=ranges_of(K), chunk=11
    )
    for tensor in (n for n in base if base[n].numel()):
        tau = ORACLES[name](
            deltas_of(base[tensor], [e[tensor] for e in experts]), np.array(weights), **options
        )
        exact = base[tensor].double() + torch.from_numpy(tau).view(base[tensor].shape)
        ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor().clamp_min(-14)
        assert ((merged[tensor].double() - exact).abs() <= 0.501 * ulp).all()


def test_oracle_of_pcb_over_the_model() -> None:
    base, experts, weights = drawn(7, 3, torch.float32)
    flat = [torch.cat([e[n].flatten() for n in base]) for e in (base, *experts)]
    tau = pcb(deltas_of(flat[0], flat[1:]), np.array(weights))
    merged = merge_tensors(base, experts, "pcb", weights=weights)
    exact = flat[0].double() + torch.from_numpy(tau)
    torch.testing.assert_close(
        torch.cat([merged[n].flatten() for n in base]).double(), exact, rtol=1e-7, atol=1e-7
    )


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("consensus", {"of": "ties"}),
    ("consensus", {"of": "ties", "scope": "tensor"}),
    ("breadcrumbs", {"then": "ties", "density": 0.5}),
    ("breadcrumbs", {"then": "ties", "rescale": "l1", "undecided": "plus", "mean": "none"}),
    ("della", {}),
    ("della", {"ranks": "tensor", "rescale": "l1", "then": "linear"}),
    ("della", {"preset": "mergekit"}),
    ("della", {"rescale": "none", "undecided": "plus", "mean": "none"}),
    ("sce", {"density": 1.0, "coefficients": "none"}),
    ("pcb", {"density": 0.9}),
    ("pcb", {"balance": "intra", "scope": "tensor"}),
    ("pcb", {"balance": "inter"}),
    ("model_stock", {"by": "row"}),
    ("model_stock", {"by": "model", "pairs": "adjacent"}),
    ("slerp", {"scope": "model", "norm": "geometric"}),
    ("slerp", {"norm": "own", "iterations": 3}),
    ("range_weighted", {"by": "snr"}),
    ("range_weighted", {"by": "min_snr"}),
    ("range_weighted", {"by": "conflict", "scope": "model"}),
]


SNR = torch.linspace(8, -8, 1000, dtype=torch.float64).exp()


@pytest.mark.parametrize(("name", "options"), [*OPTIONS, *VARIANTS], ids=str)
def test_chunks_do_not_change_a_bit_and_blocks_only_rounding(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, weights = drawn(3, 3, torch.bfloat16)
    fields: dict[str, Any] = {
        "weights": weights,
        "options": options,
        "ranges": ranges_of(3),
        "snr": SNR,
    }
    first = merge_tensors(base, experts, name, **fields)
    chunked = merge_tensors(base, experts, name, **fields, chunk=17)
    monkeypatch.setattr(job, "CHUNK", 13)  # statistics over many blocks
    blocked = merge_tensors(base, experts, name, **fields)
    for tensor in base:
        assert torch.isfinite(first[tensor]).all()
        assert torch.equal(first[tensor], chunked[tensor])
        torch.testing.assert_close(first[tensor], blocked[tensor], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), [*OPTIONS, *VARIANTS], ids=str)
def test_equal_experts_one_expert_and_none(name: str, options: dict[str, Any]) -> None:
    """Equal to the base, they give it; one of weight 1 among weights 0 counts as if alone."""
    base, experts, _ = drawn(9, 3, torch.float32)
    given: dict[str, Any] = {"options": options, "snr": SNR}
    still = merge_tensors(base, [base] * 3, name, ranges=ranges_of(3), **given)
    assert all(torch.equal(still[n], base[n]) for n in base)
    same = [experts[1]] * 3
    alone = merge_tensors(base, [experts[1]], name, weights=[1.0], ranges=ranges_of(1), **given)
    among = merge_tensors(
        base, same, name, weights=[0.0, 1.0, 0.0], ranges=[ranges_of(1)[0]] * 3, **given
    )
    if name not in (
        "della",
        "sce",
    ):  # the masks of one expert differ from another's; sce then has nothing to select by
        for tensor in base:
            torch.testing.assert_close(alone[tensor], among[tensor], rtol=1e-6, atol=1e-7)


VALUES = st.one_of(
    st.floats(-1e3, 1e3, width=16),
    st.sampled_from([0.0, 1e-45, -1e-45, 1e-30, 1e36, -1e36, 1.0, -1.0]),
    st.floats(-1, 1, width=32),
)


@pytest.mark.parametrize(("name", "options"), [*OPTIONS, *VARIANTS], ids=str)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=2, max_size=4)
    )
)
def test_any_finite_numbers_give_finite_ones_in_any_chunks(
    name: str, options: dict[str, Any], rows: list[list[float]]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, *experts = (
            {"a": torch.tensor(row, dtype=dtype), "b": torch.tensor(row[:1], dtype=dtype)}
            for row in rows
        )
        asked: dict[str, Any] = {"options": options, "ranges": ranges_of(len(experts)), "snr": SNR}
        merged = merge_tensors(base, experts, name, **asked)
        chunked = merge_tensors(base, experts, name, **asked, chunk=2)
        for tensor, same in zip(merged.values(), chunked.values(), strict=True):
            assert torch.isfinite(tensor).all()
            assert torch.equal(tensor, same)


# -- what only one of them does --------------------------------------------------------------------


def test_gram_over_rows_and_pieces_is_the_product() -> None:
    deltas = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    wide = deltas.double()
    torch.testing.assert_close(
        row_grams(deltas), torch.stack([wide[:, r] @ wide[:, r].T for r in range(5)])
    )
    blocks = HeldBlocks([Block(part[0], part) for part in deltas.view(3, -1).split(33, dim=1)])
    found = gram(blocks, weights=torch.ones(3))
    torch.testing.assert_close(found, wide.view(3, -1) @ wide.view(3, -1).T)
    assert torch.equal(cosines(torch.zeros(3, 3).double()), torch.zeros(3, 3).double())


def test_breadcrumbs_keep_exactly_their_share_of_equal_magnitudes() -> None:
    delta = torch.ones(1000)
    for density, gamma in ((0.25, 0.1), (0.9, 0.5), (1.0, 0.01), (0.0004, 0.0)):
        merged = merge_tensors(
            {"w": torch.zeros(1000)},
            [{"w": delta}],
            "breadcrumbs",
            options={"density": density, "gamma": gamma},
            chunk=64,
        )["w"]
        assert int(merged.count_nonzero()) == max(1, math.floor(density * 1000))


def test_della_ranks_by_row_and_drops_the_small_ones_more_often() -> None:
    expected = torch.tensor([[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]])
    torch.testing.assert_close(
        probabilities(torch.tensor([[3.0, -1, 2], [0, 0, 0]]), 0.5, 0.2), expected
    )
    assert probabilities(torch.tensor([[3.0]]), 0.5, 0.2).tolist() == [[0.5]]
    delta = torch.arange(1.0, 20_001).view(2, 10_000)
    options = {"density": 0.5, "epsilon": 0.3, "then": "linear"}
    merged = merge_tensors(
        {"w": torch.zeros_like(delta)}, [{"w": delta}], "della", options=options, weights=[1.0]
    )["w"]
    kept = (merged != 0).double()
    assert abs(float(kept.mean()) - 0.5) < 0.02
    assert (
        abs(float(kept[:, :1000].mean()) - 0.23) < 0.03
        and abs(float(kept[:, -1000:].mean()) - 0.77) < 0.03
    )
    assert abs(float(merged.double().sum() / delta.double().sum()) - 1) < 0.02  # p is divided out


def test_della_as_in_mergekit_ranks_a_kernel_along_its_second_axis() -> None:
    """The larger along the second axis are kept more often, at each place of a kernel."""
    delta = torch.arange(1.0, 1001).view(1, 1000, 1, 1).expand(5, 1000, 3, 3).contiguous()
    options = {"preset": "mergekit", "density": 0.5, "epsilon": 0.3, "then": "linear"}
    merged = merge_tensors(
        {"w": torch.zeros_like(delta)}, [{"w": delta}], "della", options=options, weights=[1.0]
    )["w"]
    share = (merged != 0).double().mean((0, 2, 3))
    assert (
        abs(float(share[:100].mean()) - 0.23) < 0.03
        and abs(float(share[-100:].mean()) - 0.77) < 0.03
    )


def test_oracle_of_della() -> None:
    base, experts, weights = drawn(2, 2, torch.float32)
    options = {"density": 0.6, "epsilon": 0.25, "then": "linear"}
    merged = merge_tensors(base, experts, "della", weights=weights, options=options, seed=4)
    for name in ("conv", "bias"):
        tau = torch.zeros_like(base[name], dtype=torch.float64)
        for i, expert in enumerate(experts):
            delta = expert[name].double() - base[name].double()
            rows = delta.reshape(4, -1) if name == "conv" else delta.reshape(1, -1)
            order = [
                sorted(range(len(row)), key=lambda j: (abs(row[j]), j)) for row in rows.tolist()
            ]
            ranks = torch.tensor([[o.index(j) for j in range(len(o))] for o in order])
            p = 0.35 + 0.5 * ranks / (rows.shape[1] - 1)
            u = uniform([key_of(4, "della", i, name)], slice(0, delta.numel())).view(rows.shape)
            tau += weights[i] * torch.where(u < p, rows / p, 0).view(delta.shape)
        torch.testing.assert_close(
            merged[name].double(), base[name].double() + tau, rtol=1e-6, atol=1e-6
        )


def test_della_refuses_probabilities_outside_their_interval() -> None:
    for options in ({"density": 0.1, "epsilon": 0.15}, {"density": 0.9, "epsilon": 0.15}):
        with pytest.raises(UsageError, match="outside"):
            merge_tensors({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], "della", options=options)


def test_sce_sees_squares_that_half_precision_does_not() -> None:
    base = {"w": torch.zeros(4, dtype=torch.float16)}
    experts = [
        {"w": torch.tensor([3e-4, 0, 1e-4, 0]).half()},
        {"w": torch.tensor([0, 0, 2e-4, 0]).half()},
    ]
    merged = merge_tensors(base, experts, "sce", options={"density": 1.0})["w"]
    assert merged[0] == experts[0]["w"][0] and 1e-4 < merged[2] < 2e-4


def test_model_stock_by_row_takes_each_output_alone() -> None:
    base = {"w": torch.zeros(2, 2), "conv": torch.zeros(2, 1, 1, 2)}
    rows = [torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.6, 0.8], [1, 1]])]
    experts = [{"w": row, "conv": row.view(2, 1, 1, 2)} for row in rows]
    merged = merge_tensors(base, experts, "model_stock", options={"by": "row"})
    expected = torch.tensor([[0.6, 0.3], [1, 1]])
    torch.testing.assert_close(merged["w"], expected)
    torch.testing.assert_close(merged["conv"].view(2, 2), expected)


def test_model_stock_keeps_a_negative_ratio_unless_asked_for_the_base() -> None:
    base = {"w": torch.zeros(2)}
    experts = [{"w": torch.tensor(d)} for d in ([1.0, 0], [-0.6, 0.8], [-1.0, 0])]
    two = merge_tensors(base, experts[:2], "model_stock")["w"]
    torch.testing.assert_close(two, -1.2 / 0.4 * torch.tensor([0.2, 0.4]))
    assert merge_tensors(base, experts[:2], "model_stock", options={"negative": "base"})[
        "w"
    ].tolist() == [0, 0]
    opposite = merge_tensors(base, experts[::2], "model_stock")["w"]
    assert opposite.tolist() == [0, 0]
    three = merge_tensors(base, experts, "model_stock", options={"pairs": "adjacent"})["w"]
    torch.testing.assert_close(three, torch.zeros(2), rtol=0, atol=1e-6)  # cosines -0.6 and 0.6


def test_slerp_of_two_is_the_closed_form() -> None:
    base, experts, _ = drawn(1, 2, torch.float64)
    for w in (0.1, 0.5, 0.8):
        merged = merge_tensors(base, experts, "karcher", weights=[1 - w, w])
        for name in ("conv", "linear", "bias"):
            a, b = (torch.from_numpy(d) for d in deltas_of(base[name], [e[name] for e in experts]))
            angle = (a @ b / (a.norm() * b.norm())).arccos()
            parts = ((1 - w) * angle).sin() * a / a.norm(), (w * angle).sin() * b / b.norm()
            exact = (
                base[name].flatten()
                + ((1 - w) * a.norm() + w * b.norm()) * (parts[0] + parts[1]) / angle.sin()
            )
            torch.testing.assert_close(merged[name].flatten(), exact, rtol=1e-12, atol=1e-12)


def test_the_mean_direction_of_spread_points_is_a_unit_that_nothing_pulls() -> None:
    g = torch.Generator().manual_seed(3)
    for K in (2, 3, 5, 8):
        points = torch.nn.functional.normalize(
            torch.randn(K, 6, generator=g, dtype=torch.float64), dim=1
        )
        w = torch.rand(K, generator=g, dtype=torch.float64)
        a = direction(points @ points.T, w / w.sum(), 1000, 1e-13)
        u = a @ points
        angles = (points @ u).arccos()
        pull = (w * angles / angles.sin()) @ (points - torch.outer(points @ u, u))
        assert abs(float(u.norm()) - 1) < 1e-12 and float(pull.norm()) < 1e-10


def test_slerp_is_differentiable_in_the_weights() -> None:
    from demerge.merging.methods.karcher import coefficients

    deltas = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = deltas @ deltas.T

    def lengths(weights: Tensor) -> Tensor:
        return coefficients(
            HeldBlocks([]),
            weights=weights,
            gram=products,
            norm="mean",
            iterations=60,
            tolerance=1e-13,
        )

    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lengths, (weights,), atol=1e-5)


def test_range_weighted_needs_ranges_and_schedule() -> None:
    base, experts = {"w": torch.zeros(2)}, [{"w": torch.ones(2)}] * 2
    for ranges in ((), [HALVES[0], None]):
        with pytest.raises(UsageError, match="timesteps of each expert"):
            merge_tensors(base, experts, "range_weighted", ranges=ranges)
    with pytest.raises(UsageError, match="noise schedule"):
        merge_tensors(base, experts, "range_weighted", options={"by": "snr"}, ranges=HALVES)
    with pytest.raises(UsageError, match="exceeds"):
        merge_tensors(
            base,
            experts,
            "range_weighted",
            options={"by": "snr"},
            ranges=HALVES,
            snr=torch.ones(500),
        )
    with pytest.raises(UsageError, match="needs fisher for each"):
        merge_tensors(base, experts, "range_weighted", options={"by": "fisher"}, ranges=HALVES)
    with pytest.raises(UsageError, match="sum to 0"):
        merge_tensors(base, experts, "range_weighted", ranges=[HALVES[0]] * 2, weights=[1, -1])


def test_range_weighted_by_signal_to_noise() -> None:
    base, experts = (
        {"w": torch.zeros(2)},
        [{"w": torch.tensor([1.0, 0])}, {"w": torch.tensor([0, 1.0])}],
    )
    ranges = [TimestepRange(0, 1), TimestepRange(1, 4)]
    snr = torch.tensor(
        [100.0, 10, 1, 0], dtype=torch.float64
    )  # the last counts as 1: edges 100, sqrt 1000, sqrt 10, 1, 1
    by_log = merge_tensors(
        base, experts, "range_weighted", options={"by": "snr"}, ranges=ranges, snr=snr
    )["w"]
    torch.testing.assert_close(by_log, torch.tensor([0.25, 0.75]))
    by_loss = merge_tensors(
        base, experts, "range_weighted", options={"by": "min_snr"}, ranges=ranges, snr=snr
    )["w"]
    torch.testing.assert_close(by_loss, torch.tensor([0.05, 2.5]) / 2.55)  # 5/100; 5/10 + 1 + 1


def test_range_weighted_by_fisher_trace_differs_by_tensor() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "frozen": torch.zeros(2)}
    experts = [{n: torch.full((2,), value) for n in base} for value in (1.0, 3.0)]
    fishers = [
        {"a": torch.tensor([1.0, 2]), "b": torch.tensor([9.0, 0]), "frozen": torch.zeros(2)},
        {"a": torch.tensor([1.0, 0]), "b": torch.tensor([1.0, 0]), "frozen": torch.zeros(2)},
    ]
    chosen = find_method("range_weighted")

    def merged(**options: Any) -> dict[str, Tensor]:
        given = {"fisher": fishers}
        return assemble(
            MergeJob(
                chosen,
                base,
                experts,
                [0.5, 0.5],
                chosen.resolve_options({"by": "fisher", **options}),
                given,
                ranges=HALVES,
            )
        )

    assert {n: float(t[0]) for n, t in merged().items()} == {
        "a": 2.0,
        "b": 1.5,
        "frozen": 2.5,
    }  # 3:3, 9:3, 1:3
    assert {float(t[0]) for t in merged(scope="model").values()} == {
        1.6666666269302368
    }  # 12:6 of all


def test_a_1_norm_that_cannot_be_restored_leaves_finite_numbers() -> None:
    """All large entries may be dropped: what is left would be multiplied by more than float32."""
    delta = torch.tensor([[1e-30, 1e36, 1e-30, 0.0]])
    uniform = torch.tensor([[0.0, 0.99, 0.0, 0.0]])
    thinned = prune(delta, uniform, 0.5, 0.15, "tensor", "l1")
    assert torch.isfinite(thinned).all() and thinned[0, 1] == thinned[0, 3] == 0
    assert norm_ratio(
        torch.tensor([1e36, 2.0, 1.0]).double(), torch.tensor([1e-30, 4, 0])
    ).tolist() == [
        torch.finfo(torch.float32).max,
        0.5,
        1,
    ]
