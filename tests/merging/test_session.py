"""The session: what merge_tensors gives, in place, differentiable in w, with the base restored;
memory said first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demerge.errors import InputError, ResourceError, UsageError
from demerge.merging import MergeSession, Statistic, all_methods, merge_tensors
from demerge.merging import session as home
from demerge.merging.blocks import block_of
from demerge.merging.engine.resident import Resident
from demerge.timesteps import TimestepRange

RANGES = [TimestepRange(0, 250), TimestepRange(250, 500), TimestepRange(500, 1000)]
SHAPES = {
    "down.conv": (3, 2, 3, 3),
    "down.linear": (5, 7),
    "up.bias": (5,),
    "up.scalar": (),
    "up.empty": (0, 4),
}
W = [0.5, 0.2, 0.4]

State = dict[str, Tensor]


def models(
    dtype: torch.dtype = torch.float32, K: int = 3, scale: float = 0.05
) -> tuple[State, list[State], dict[str, Any]]:
    """A base, K experts, and the inputs that methods need."""
    g = torch.Generator().manual_seed(3)
    base = {n: torch.randn(s, generator=g).to(dtype) for n, s in SHAPES.items()}
    experts = [
        {n: t + (scale * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()}
        for _ in range(K)
    ]
    fishers = [
        {n: torch.rand(t.shape, generator=g) + 0.1 for n, t in base.items()} for _ in range(K)
    ]
    grams = [
        {n: t.flatten(1).T @ t.flatten(1) for n, t in f.items() if t.ndim > 1} for f in fishers
    ]
    return base, experts, {"fisher": fishers, "gram": grams}


def session_of(name: str, stored: torch.dtype = torch.float32, **more: Any) -> MergeSession:
    base, experts, inputs = models(stored)
    given = {n: inputs[n] for n in all_methods()[name].inputs}
    return MergeSession(base, experts, method=name, inputs=given, ranges=RANGES, **more)


def engine(name: str, w: Any, dtype: torch.dtype = torch.float32, **options: Any) -> State:
    base, experts, inputs = models(dtype)
    given = {n: inputs[n] for n in all_methods()[name].inputs}
    return merge_tensors(
        base, experts, name, weights=list(w), options=options, inputs=given, ranges=RANGES
    )


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], rtol: float, atol: float) -> None:
    assert list(one) == list(other)
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=rtol, atol=atol)


# -- the same as the engine ------------------------------------------------------------------------

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in all_methods()),
    ("ties", {"density": 0.5, "scope": "tensor"}),
    ("ties", {"density": 0.5, "keep": "exact"}),
    ("dare", {"rescale": "l1", "then": "ties"}),
    ("fisher", {"normalise": "l2"}),
    ("consensus", {"of": "ties"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_theta_is_what_the_engine_gives(name: str, options: dict[str, Any]) -> None:
    session = session_of(name, options=options)
    for w in (W, [0.1, 0.9, 0.3]):
        close(session.theta(w), engine(name, w, **options), 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, "stored"),
        (torch.float64, torch.float32),
        (torch.float64, "stored"),
    ],
)
def test_every_dtype_comes_out_as_it_went_in(dtype: torch.dtype, kept: Any) -> None:
    session = session_of("task_arithmetic", dtype, dtype=kept)
    digits = torch.finfo(dtype).eps
    close(
        session.theta(W),
        engine("task_arithmetic", W, dtype),
        max(4 * digits, 1e-6),
        max(digits, 1e-7),
    )


def test_masks_are_those_of_the_seed() -> None:
    base, experts, _ = models()
    session = MergeSession(base, experts, method="dare", seed=5)
    close(session.theta(W), merge_tensors(base, experts, "dare", weights=W, seed=5), 1e-4, 1e-5)
    assert not torch.equal(
        session.theta(W)["down.linear"], session_of("dare").theta(W)["down.linear"]
    )


# -- statistics ------------------------------------------------------------------------------------


def test_statistics_that_do_not_use_the_weights_are_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: list[str] = []
    compute = Resident._compute

    def counted(self: Resident, statistic: Statistic, *rest: Any) -> Any:
        computed.append(statistic.name)
        return compute(self, statistic, *rest)

    monkeypatch.setattr(Resident, "_compute", counted)
    session = session_of("ties", options={"density": 0.5})
    session.theta(W)
    assert computed == ["threshold", "majority"]
    session.theta([0.1, 0.2, 0.3])
    assert computed[2:] == ["majority"]


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["task_arithmetic", "average", "ties", "fisher"])
def test_gradients_are_finite_differences(name: str) -> None:
    session = session_of(
        name, torch.float64, options={"density": 0.6} if name == "ties" else {}, dtype=torch.float64
    )
    g = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}

    def f(w: Tensor) -> Tensor:
        return torch.stack([(t * direction[n]).sum() for n, t in session.theta(w).items()]).sum()

    w = torch.tensor(W, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(w), w)
    step = 1e-6
    for i in range(3):
        e = step * torch.eye(3, dtype=torch.float64)[i]
        with torch.no_grad():
            difference = (f(w + e) - f(w - e)) / (2 * step)
        torch.testing.assert_close(gradient[i], difference, rtol=1e-5, atol=1e-7)
    assert float(gradient.abs().max()) > 1e-3


@pytest.mark.parametrize("name", all_methods())
def test_theta_of_every_method_has_a_gradient_or_none_and_no_nan(name: str) -> None:
    w = torch.tensor(W, requires_grad=True)
    total = torch.stack([t.double().sum() for t in session_of(name).theta(w).values()]).sum()
    if total.requires_grad:
        total.backward()
        assert w.grad is not None and bool(torch.isfinite(w.grad).all())


class Net(nn.Module):
    """Two layers, a counter, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 2)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(torch.tanh(self.inner(x)))
        return y


def nets(K: int) -> tuple[Net, list[Net]]:
    """A base and K experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, experts = Net(), [Net() for _ in range(K)]
        for expert in experts:
            expert.load_state_dict(
                {
                    n: t + (0.3 * torch.randn(t.shape) if n != "steps" else 0)
                    for n, t in base.state_dict().items()
                }
            )
    return base, experts


def test_gradient_descent_recovers_known_coefficients() -> None:
    base, experts = nets(2)
    session, true = MergeSession(base, experts), torch.tensor([0.7, -0.2])
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    y = session.call(base, true, x)
    w = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.05)
    for _ in range(150):
        loss = (session.call(base, w, x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(w.detach(), true, rtol=0, atol=5e-3)
    assert all(p.grad is None for p in base.parameters())


# -- modules ---------------------------------------------------------------------------------------


def test_apply_writes_in_place_and_zero_is_the_base() -> None:
    base, experts = nets(3)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    session = MergeSession(base, experts)
    places = {n: t.data_ptr() for n, t in base.state_dict().items()}
    session.apply(W, base)
    assert {n: t.data_ptr() for n, t in base.state_dict().items()} == places
    states = [e.state_dict() for e in experts]
    merged = merge_tensors(before, states, "task_arithmetic", weights=W)
    close(base.state_dict(), merged, 1e-5, 1e-6)
    assert torch.equal(base.cache, torch.ones(2)) and int(base.steps) == 3
    assert all(p.requires_grad and p.grad_fn is None for p in base.parameters())
    session.apply(0, base)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    for method in ("average", "fisher"):
        inputs = (
            {"fisher": [{n: t.float().abs() for n, t in s.items()} for s in states]}
            if method == "fisher"
            else None
        )
        MergeSession(before, experts, method=method, inputs=inputs).apply([0, 0, 0], base)
        assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_call_agrees_with_apply() -> None:
    base, experts = nets(2)
    session, x = MergeSession(base, experts, method="ties"), torch.ones(3, 4)
    called = session.call(base, [0.3, 0.6], x)
    session.apply(torch.tensor([0.3, 0.6], requires_grad=True), base)
    torch.testing.assert_close(called, base(x))


def test_a_module_of_other_dtype_and_layout_gets_the_weights_too() -> None:
    base, experts = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    session = MergeSession(base, [experts])
    last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).double()
    session.apply(1.0, last)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.weight, experts.weight.double(), rtol=1e-6, atol=1e-6)
    x = torch.ones(1, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(session.call(last, 1.0, x), last(x))


def test_theta_is_a_copy_even_where_nothing_changes() -> None:
    base, _ = nets(0)
    state = {n: t.clone() for n, t in base.state_dict().items()}
    session = MergeSession(state, [state, state], method="ties")
    for tensor in session.theta([1, 2]).values():
        tensor.zero_()
    close(session.theta([1, 2]), {n: t for n, t in state.items() if t.is_floating_point()}, 0, 0)
    assert all(held.deltas is None for held in session._resident.tensors.values())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (nn.Sequential(nn.Linear(4, 5)), "4 missing: inner.weight"),
        (
            nn.ModuleDict({"inner": nn.Linear(4, 5), "outer": nn.Linear(5, 3)}),
            r"2 of another shape: outer.weight \[3, 5\]",
        ),
        (
            nn.ModuleDict(
                {"inner": nn.Linear(4, 5), "outer": nn.Linear(5, 2), "a": nn.Linear(1, 1)}
            ),
            "2 extra: a.weight",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused(broken: nn.Module, message: str) -> None:
    base, experts = nets(2)
    with pytest.raises(InputError, match=message):
        MergeSession(base, experts).apply([1, 1], broken)


# -- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["blocks", ["down.**", "up.**"], ["down.linear", "**"]])
def test_each_group_has_weights_of_its_own(groups: Any) -> None:
    session = session_of("task_arithmetic", groups=groups)
    w = torch.tensor([[0.5, 0.1, 0.2], [1.0, 0.3, 0.0]], requires_grad=True)
    theta = session.theta(w)
    assert len(session.groups) == 2
    for name in SHAPES:
        row = (
            session.groups.index(block_of(name))
            if groups == "blocks"
            else int(name != "down.linear" if "**" in groups else "up" in name)
        )
        torch.testing.assert_close(
            theta[name], engine("task_arithmetic", w[row].tolist())[name], rtol=1e-5, atol=1e-6
        )
    theta["down.linear"].sum().backward()
    assert w.grad is not None
    assert int(w.grad.abs().sum(1).count_nonzero()) == 1, "other groups have no part in it"
    close(session.theta(W), session_of("task_arithmetic").theta(W), 0, 0)


def test_statistics_over_the_model_see_each_groups_weights() -> None:
    session, alike = session_of("ties", groups="blocks", options={"density": 0.5}), [W, W]
    close(session.theta(alike), engine("ties", W, density=0.5), 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["down.**"], "up.bias is in no group"),
        (["**", "up.**"], "matches what earlier"),
        (["mid.**", "**"], "matches no tensor"),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session_of("average", groups=groups)


# -- refusals and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("w", [[1.0, 2.0], [[1.0, 2.0, 3.0]], [1.0, 2.0, float("nan")]])
def test_weights_that_do_not_fit_are_refused(w: Any) -> None:
    with pytest.raises(UsageError, match="weights"):
        session_of("average").theta(w)


def test_memory_is_known_first_and_refused_where_it_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, experts, _ = models()
    numel = sum(t.numel() for t in base.values())
    assert MergeSession(base, experts).bytes == 4 * numel * (1 + 3)
    assert MergeSession(base, experts, dtype=torch.float16).bytes == numel * (4 + 3 * 2)
    assert MergeSession(base, experts, method="dare").bytes == 4 * numel * (1 + 3 + 3)
    monkeypatch.setattr(home, "free_bytes", lambda device: 100)
    with pytest.raises(ResourceError, match=rf"{16 * numel:,} bytes on cpu, 100 are free"):
        MergeSession(base, experts)


def test_experts_that_do_not_fit_are_refused() -> None:
    base, experts, _ = models()
    with pytest.raises(InputError, match=r"1 missing: down\.conv"):
        MergeSession(base, [{n: t for n, t in experts[0].items() if n != "down.conv"}])
    with pytest.raises(UsageError, match="no expert"):
        MergeSession(base, [])
    with pytest.raises(UsageError, match="needs fisher"):
        MergeSession(base, experts, method="fisher")
    with pytest.raises(InputError, match="holds NaN"):
        MergeSession(base, [{n: t * torch.nan for n, t in experts[0].items()}])


# -- files -----------------------------------------------------------------------------------------


def test_paths_bring_their_inputs_and_ranges(
    tiny: Path, tmp_path: Path, add_expert: Callable[..., Path]
) -> None:
    experts = [
        add_expert(tmp_path / name, *span) for name, span in (("a", (0, 500)), ("b", (500, 1000)))
    ]
    weights = load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors")
    g = torch.Generator().manual_seed(0)
    for expert in experts:
        changed = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in weights.items()}
        save_file(changed, expert / "unet" / "diffusion_pytorch_model.safetensors")
        save_file(
            {n: torch.rand(t.shape, generator=g) for n, t in weights.items()},
            expert / "fisher.safetensors",
        )
    session = MergeSession(tiny, [str(e) for e in experts], method="fisher")
    assert session._resident.constants["ranges"] == [
        TimestepRange(0, 500),
        TimestepRange(500, 1000),
    ]
    assert session._resident.constants["snr"].shape == (1000,)
    unet = diffusers.UNet2DModel.from_pretrained(tiny / "unet")
    session.apply([0.5, 0.5], unet)
    states = [load_file(e / "unet" / "diffusion_pytorch_model.safetensors") for e in experts]
    fishers = [load_file(e / "fisher.safetensors") for e in experts]
    merged = merge_tensors(
        weights, states, "fisher", weights=[0.5, 0.5], inputs={"fisher": fishers}
    )
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-4, atol=1e-5)
    (experts[0] / "expert.json").write_text(
        json.dumps({"range": [0, 500], "base_sha256": "0" * 64})
    )
    with pytest.raises(InputError, match="was finetuned from a base of sha256"):
        MergeSession(tiny, experts)
