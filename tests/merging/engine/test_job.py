"""The engine: exact at its corners, the same in any chunks, right against a slow oracle, and strict
about its input."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demerge.errors import InputError, NumericalError, ResourceError, UsageError
from demerge.merging import Between, all_methods, merge, merge_tensors, registry
from demerge.merging.contract import describe_method
from demerge.merging.engine.reader import CHUNK, uniform
from demerge.timesteps import TimestepRange

State = dict[str, Tensor]


def states(K: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    g = torch.Generator().manual_seed(0)
    base = {
        "a": torch.randn(40, 30, generator=g).to(dtype),
        "b": torch.randn(17, generator=g).to(dtype),
    }
    base |= {"count": torch.arange(5)}

    def expert() -> State:
        # distances from far below to far above the base's own size: adding the difference back does
        # not give the expert
        moved = {
            n: (t + torch.randn(t.shape, generator=g) * 10 ** torch.randn(t.shape, generator=g)).to(
                dtype
            )
            for n, t in base.items()
        }
        return moved | {"count": base["count"].clone()}

    return base, [expert() for _ in range(K)]


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "dare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_hot_weights_give_that_expert_and_zeros_the_base(name: str, dtype: torch.dtype) -> None:
    base, experts = states(dtype=dtype)
    options = {} if name in ("average", "task_arithmetic") else {"density": 1.0}
    for i, expert in enumerate(experts):
        merged = merge_tensors(
            base, experts, name, weights=[float(j == i) for j in range(3)], options=options
        )
        assert all(torch.equal(merged[n], expert[n]) for n in base)
    if name != "average":
        merged = merge_tensors(base, experts, name, weights=[0, 0, 0], options=options)
        assert all(torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_is_within_half_an_ulp_of_itself_in_float64(
    name: str, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(3)
    shapes = {"conv": (12, 8, 3, 3), "linear": (40, 30), "bias": (40,)}
    base = {n: (0.05 * torch.randn(shape, generator=g)).to(dtype) for n, shape in shapes.items()}
    experts = [
        {n: (t + 0.003 * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()}
        for _ in range(4)
    ]
    given: dict[str, Any] = {
        "weights": [0.5, 0.25, 0.25, 0.5],
        "ranges": [TimestepRange(i, i + 250) for i in range(4)],
    }
    fishers = [{n: torch.rand(t.shape, generator=g) for n, t in base.items()} for _ in experts]
    grams = [
        {"linear": torch.eye(30) + torch.rand(30, 1, generator=g) * torch.ones(1, 30)}
        for _ in experts
    ]
    given["inputs"] = {
        "fisher": fishers,
        "gram": [{n: t + t.T for n, t in gram.items()} for gram in grams],
    }
    merged = merge_tensors(base, experts, name, **given)
    reference = merge_tensors(double(base), [double(e) for e in experts], name, **given)
    for n, exact in reference.items():
        ulp = torch.finfo(dtype).eps * exact.abs().log2().floor().exp2().clamp_min(
            torch.finfo(dtype).tiny
        )
        slack = (
            0 if dtype == torch.float32 else 3e-3 * ulp
        )  # float32 in between, which rounds first
        assert bool(((merged[n].double() - exact).abs() <= 0.5 * ulp + slack).all())


def double(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}


def oracle_ties(base: State, experts: list[State], density: float, weights: list[float]) -> State:
    """TIES over the whole model by sorting, with everything in memory."""
    names = [n for n, t in base.items() if t.is_floating_point()]
    flat = torch.cat([base[n].reshape(-1) for n in names])
    deltas = torch.stack([torch.cat([e[n].reshape(-1) for n in names]) - flat for e in experts])
    k = max(1, int(density * flat.numel()))
    thresholds = deltas.abs().sort(dim=1, descending=True).values[:, k - 1 : k]
    kept = torch.where(deltas.abs() >= thresholds, deltas, torch.zeros(()))
    votes = kept * torch.tensor(weights).unsqueeze(1)
    sign = votes.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    merged = flat.clone()
    for j in range(flat.numel()):
        agree = [i for i in range(len(experts)) if votes[i, j] * sign[j] > 0]
        if agree:
            merged[j] += sum(float(votes[i, j]) for i in agree) / sum(weights[i] for i in agree)
    sizes = [base[n].numel() for n in names]
    parts = {
        n: part.view(base[n].shape) for n, part in zip(names, merged.split(sizes), strict=True)
    }
    return {n: parts.get(n, t) for n, t in base.items()}


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_streamed_ties_is_that_of_the_slow_oracle(density: float) -> None:
    base, experts = states()
    weights = [0.2, 0.5, 0.3]
    merged = merge_tensors(
        base, experts, "ties", weights=weights, options={"density": density}, chunk=100
    )
    expected = oracle_ties(base, experts, density, weights)
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], rtol=2e-6, atol=1e-6)


def merged_with(name: str, **how: Any) -> State:
    base, experts = states()
    grams = [{"a": torch.eye(30) * (i + 1)} for i in range(len(experts))]
    inputs = {"fisher": [{n: t.abs() for n, t in e.items()} for e in experts], "gram": grams}
    ranges = [TimestepRange(0, 250)] * len(experts)
    return merge_tensors(base, experts, name, inputs=inputs, ranges=ranges, **how)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_chunks_leave_no_trace(name: str) -> None:
    whole, parts = merged_with(name), merged_with(name, chunk=64)
    assert all(torch.equal(tensor, parts[n]) for n, tensor in whole.items())


@pytest.mark.parametrize("name", ["dare", "ties", "pcb", "regmean", "sce"])
def test_workers_leave_no_trace(name: str) -> None:
    whole, parts = merged_with(name), merged_with(name, chunk=250, num_workers=3)
    assert all(torch.equal(tensor, parts[n]) for n, tensor in whole.items())


def test_random_numbers_are_addressed_by_their_index() -> None:
    whole = uniform([123], slice(0, 1000))[0]
    for start, stop in [(0, 1), (3, 9), (8, 16), (501, 777), (999, 1000), (5, 5)]:
        assert torch.equal(uniform([123], slice(start, stop))[0], whole[start:stop])
    reference = np.random.Generator(np.random.Philox(key=123)).random(1000, dtype=np.float32)
    assert torch.equal(whole, torch.from_numpy(reference))


def test_whole_methods_see_tensors_in_their_shape() -> None:
    shapes = []

    def transposed(base: Tensor, deltas: Tensor, *, weights: Tensor) -> Tensor:
        shapes.append((tuple(base.shape), tuple(deltas.shape)))
        return base + deltas.sum(0)

    base, experts = states(K=2)
    merge_tensors(
        base, experts, describe_method(transposed, "t", paper="", needs_full_tensor=True), chunk=3
    )
    assert shapes == [((40, 30), (2, 40, 30)), ((17,), (2, 17))]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("a"), "1 missing: a"),
        (lambda e: e.update(c=torch.ones(1)), "1 extra: c"),
        (
            lambda e: e.update(a=torch.ones(30, 40)),
            r"1 of another shape: a \[30, 40\] for \[40, 30\]",
        ),
        (lambda e: e.update(count=torch.arange(5) + 1), "1 of unequal integers: count"),
        (lambda e: e.update(count=torch.ones(5)), "1 of another kind of dtype: count"),
        (lambda e: (e.pop("a"), e.update(c=torch.ones(1))), "1 missing: a; 1 extra: c"),
    ],
)
def test_experts_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    base, experts = states()
    change(experts[1])
    with pytest.raises(InputError, match=f"expert 1 does not fit the base: {message}"):
        merge_tensors(base, experts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["the base", "expert 1"])
def test_numbers_that_are_not_finite_are_refused_by_name(value: float, where: str) -> None:
    base, experts = states()
    (base if where == "the base" else experts[1])["b"][3] = value
    with pytest.raises(InputError, match=f"{where}: tensor b holds NaN or Inf"):
        merge_tensors(base, experts)


def test_results_that_are_not_finite_are_refused() -> None:
    wide = torch.full((2,), 1.5e308, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"exceeds torch\.float64"):
        merge_tensors({"a": wide}, [{"a": -wide}])
    with pytest.raises(NumericalError, match="makes NaN or Inf"):
        merge_tensors({"a": torch.zeros(2, dtype=torch.float64)}, [{"a": wide}], weights=[2.0])
    with pytest.raises(NumericalError, match="does not fit"):
        merge_tensors({"a": torch.zeros(2)}, [{"a": torch.full((2,), 3e38)}], weights=[2.0])
    half = {"a": torch.full((2,), 6e4, dtype=torch.float16)}
    with pytest.raises(NumericalError, match="does not fit"):
        merge_tensors({"a": torch.zeros(2, dtype=torch.float16)}, [half], weights=[2.0])


@pytest.mark.parametrize(
    "weights", [[1.0], [1, 2, 3, 4], [1, 1, float("nan")], [1, 1, float("inf")]]
)
def test_weights_are_one_finite_number_per_expert(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="are not 3 finite numbers"):
        merge_tensors(*states(), weights=weights)


def test_there_must_be_an_expert() -> None:
    with pytest.raises(UsageError, match="no expert"):
        merge_tensors(states()[0], [])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tise", {}, "unknown merge method 'tise'"),
        ("ties", {"density": 0}, r"density=0 is not float in \(0, 1\]"),
        ("ties", {"density": "nan"}, "density=nan"),
        ("ties", {"scale": "inf"}, "scale=inf is not float"),
        ("ties", {"density": "many"}, "density=many"),
        ("ties", {"scope": "world"}, "scope=world is not model | tensor"),
        ("ties", {"densty": 1}, "no option 'densty'"),
        ("average", {"scale": 1}, "no option 'scale'"),
        ("fisher", {}, "needs fisher for each of 3 experts"),
        ("nowhere.py:f", {}, r"nowhere.py: no such Python file"),
    ],
)
def test_wrong_methods_and_options_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, InputError), match=message):
        merge_tensors(*states(), name, options=options)


def test_inputs_must_fit() -> None:
    base, experts = states()
    with pytest.raises(InputError, match="fisher of expert 0: 1 tensors missing"):
        merge_tensors(base, experts, "fisher", inputs={"fisher": [{"a": base["a"]}] * 3})


NAN, EYE = float("nan"), torch.eye(30)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            "fisher",
            {"a": torch.full((40, 30), NAN)},
            "fisher of expert 1: tensor a holds NaN or Inf",
        ),
        ("fisher", {"a": -torch.ones(40, 30)}, "a Fisher has negative entries"),
        ("regmean", {"a": NAN * EYE}, "gram of expert 1: tensor a holds NaN or Inf"),
        ("regmean", {"a": -EYE}, "has a negative diagonal"),
        ("regmean", {"a": EYE + EYE.roll(1, 0)}, "is not symmetric"),
        (
            "regmean",
            {"other": EYE},
            "gram of expert 1: 1 tensors that the base does not have: other",
        ),
    ],
)
def test_inputs_must_be_what_they_are_named(name: str, wrong: State, message: str) -> None:
    base, experts = states()
    good = {"a": EYE} if name == "regmean" else {n: torch.ones(base[n].shape) for n in "ab"}
    inputs = {"gram" if name == "regmean" else name: [good, {**good, **wrong}, good]}
    with pytest.raises(InputError, match=message):
        merge_tensors(base, experts, name, inputs=inputs)


# -- methods of other people -----------------------------------------------------------------------


def test_options_are_read_from_the_signature() -> None:
    def f(
        base: Tensor,
        deltas: Tensor,
        *,
        weights: Tensor,
        uniform: Tensor,
        activations: Tensor,
        a: Annotated[float, Between(0, 2)] = 1.5,
        b: bool = False,
        c: int = 3,
        d: Literal["x", "y"] = "x",
    ) -> Tensor:
        """Say what it does.

        And more.
        """
        return base

    method = describe_method(f, "f", paper="arXiv 1")
    assert method.summary == "Say what it does."
    assert method.inputs == ("activations",) and method.needs_random
    assert method.resolve_options({"a": "0.5", "b": "true", "c": "4", "d": "y"}) == {
        "a": 0.5,
        "b": True,
        "c": 4,
        "d": "y",
    }
    assert method.resolve_options({}) == {"a": 1.5, "b": False, "c": 3, "d": "x"}
    assert method.document()["options"]["a"] == {"default": 1.5, "rule": "float in [0, 2]"}
    for wrong in (
        {"a": "3"},
        {"a": True},
        {"b": "maybe"},
        {"c": "1.5"},
        {"c": 1.5},
        {"c": True},
        {"d": "z"},
    ):
        with pytest.raises(UsageError):
            method.resolve_options(wrong)


def test_a_method_can_be_a_function_in_a_file(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def largest(base, deltas, *, weights, factor: float = 1.0):\n    return base + factor * deltas.amax(0)\n"
    )
    base, experts = (
        {"w": torch.zeros(2)},
        [{"w": torch.tensor([1.0, -1])}, {"w": torch.tensor([2.0, -3])}],
    )
    assert merge_tensors(base, experts, f"{path}:largest", options={"factor": "2"})[
        "w"
    ].tolist() == [4, -2]
    with pytest.raises(UsageError, match="no function 'smallest'"):
        merge_tensors(base, experts, f"{path}:smallest")


FAULTS = {
    "short": (
        "def short(base, deltas, *, weights): return base[:1]",
        r"short returns \[1\] for \[2\] of tensor w",
    ),
    "nothing": ("def nothing(base, deltas, *, weights): return None", "nothing returns NoneType"),
    "raises": (
        "def raises(base, deltas, *, weights): raise ValueError('boom')",
        "raises fails at tensor w: ValueError: boom",
    ),
    "third": (
        "def third(base, deltas, weights): return base",
        "third is not a merge method: missing a required argument",
    ),
    "odd": (
        "def odd(base, deltas, *, weights, a=None): return base",
        "option a=None of a merge method has the type",
    ),
    "lost": (
        "def lost(base, deltas, *, weights: 'Gone'): return base",
        "lost is not a merge method: name 'Gone'",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_method_of_another_is_named(name: str, tmp_path: Any) -> None:
    source, message = FAULTS[name]
    path = tmp_path / "mine.py"
    path.write_text(source + "\n")
    with pytest.raises(UsageError, match=message):
        merge_tensors({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], f"{path}:{name}")


def test_options_without_a_type_have_that_of_their_default() -> None:
    def f(base, deltas, *, weights, fisher, a=0.5, b=True):  # type: ignore[no-untyped-def]
        return base

    method = describe_method(f, "f", paper="")
    assert method.inputs == ("fisher",) and method.resolve_options({"a": "2", "b": "false"}) == {
        "a": 2.0,
        "b": False,
    }


PLUGIN = """
from demerge.merging import method
@method("plugin_module", paper="")
def named(base, deltas, *, weights):
    return base
def plain(base, deltas, *, weights, scale: float = 1.0):
    return base + scale * deltas.sum(0)
"""


def test_other_packages_register_modules_and_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    record = tmp_path / "plugin-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    points = record / "entry_points.txt"
    points.write_text("[demerge.methods]\na = plugin\nplugin_plain = plugin:plain\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_METHODS", dict(all_methods()))
    registry._load.__wrapped__()
    assert {"plugin_module", "plugin_plain"} <= set(all_methods())
    points.write_text("[demerge.methods]\na = plugin:gone\n")
    with pytest.raises(InputError, match="plugin has a merge method that cannot be imported"):
        registry._load.__wrapped__()


# -- files -----------------------------------------------------------------------------------------


def saved(folder: Path) -> tuple[Path, list[Path]]:
    """Save a base and experts: larger than a chunk, with tensors that are not merged."""
    base, experts = states(K=2)
    g = torch.Generator().manual_seed(1)
    large = [torch.randn(CHUNK + 5, generator=g).half() for _ in range(3)]
    models = [
        state | {"large": each, "flag": torch.tensor([True])}
        for state, each in zip([base, *experts], large, strict=True)
    ]
    paths = [folder / f"{i}.safetensors" for i in range(3)]
    for model, path in zip(models, paths, strict=True):
        save_file(model, path)
    return paths[0], paths[1:]


@pytest.mark.parametrize("options", [{"scope": "model"}, {"scope": "tensor"}])
def test_a_file_has_the_same_bytes_whoever_writes_them(
    tmp_path: Path, options: dict[str, str]
) -> None:
    base, experts = saved(tmp_path)
    places = [tmp_path / str(n) / "out.safetensors" for n in (1, 2)]
    made = [
        merge(base, experts, out, method="ties", options=options, num_workers=n).path
        for n, out in enumerate(places, 1)
    ]
    assert len({path.read_bytes() for path in made}) == 1
    together = merge_tensors(
        load_file(base), [load_file(path) for path in experts], "ties", options=options
    )
    for name, tensor in load_file(made[0]).items():
        assert torch.equal(tensor, together[name])


def test_a_full_disk_that_a_worker_meets_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = saved(tmp_path)
    there, room = set(tmp_path.iterdir()), 1 << 18

    def pwrite(file: int, data: memoryview, place: int) -> int:
        if place + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(
        ResourceError, match=re.escape(f"{tmp_path / 'out.safetensors'}: the disk is full")
    ):
        merge(base, experts, tmp_path / "out.safetensors", num_workers=2)
    assert set(tmp_path.iterdir()) == there


def test_a_broken_file_of_a_method_says_how_to_see_the_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(InputError, match=r"broken\.py: cannot be imported") as error:
        registry.find_method(f"{path}:halve")
    assert error.value.fix == f"correct the code, until this shows no error: python {path}"
