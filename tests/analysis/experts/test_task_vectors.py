"""Task vectors: numbers by hand, and keys that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demerge.analysis.experts.task_vectors import compare_task_vectors
from demerge.errors import InputError, UsageError

BASE = {"a": torch.tensor([1.0, 1.0]), "b": torch.zeros(1, 2), "steps": torch.tensor(3)}


def expert(a: list[float], b: list[float]) -> dict[str, torch.Tensor]:
    return {"a": BASE["a"] + torch.tensor(a), "b": torch.tensor([b]), "steps": torch.tensor(9)}


def test_norms_cosines_and_sign_conflict_by_hand() -> None:
    found = compare_task_vectors(BASE, [expert([3, 4], [0, 0]), expert([3, -4], [0, 2])])
    assert found.names == ("a", "b")
    assert found.norms.tolist() == [[5, 5], [0, 2]]
    assert found.cosine == pytest.approx(
        np.array([[1, -7 / (5 * 29**0.5)], [-7 / (5 * 29**0.5), 1]])
    )
    assert found.sign_conflict == pytest.approx(np.array([[0, 16 / 25], [16 / 25, 0]]))


def test_an_unchanged_expert_has_no_direction() -> None:
    found = compare_task_vectors(BASE, [expert([0, 0], [0, 0]), expert([1, 0], [0, 0])])
    assert (
        np.isnan(found.cosine[0]).all()
        and found.cosine[1, 1] == 1
        and np.isnan(found.sign_conflict[0, 1])
    )


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"missing \['b'\], extra \['c'\]"):
        compare_task_vectors(BASE, [{"a": BASE["a"], "c": BASE["b"], "steps": BASE["steps"]}])
    with pytest.raises(InputError, match="'a' is \\[3\\]"):
        compare_task_vectors(BASE, [{**BASE, "a": torch.zeros(3)}])
    with pytest.raises(UsageError):
        compare_task_vectors(BASE, [])


def test_blocks_add_up_their_tensors() -> None:
    base = {
        "up_blocks.0.a": torch.zeros(2),
        "conv_in.weight": torch.zeros(3),
        "up_blocks.0.b": torch.zeros(2, 2),
    }
    g = torch.Generator().manual_seed(0)
    experts = [{n: torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(3)]
    whole = compare_task_vectors(base, experts)
    blocks = whole.by_block()
    assert blocks.names == ("in", "up.0")
    assert blocks.norms[1] == pytest.approx(np.sqrt(whole.norms[0] ** 2 + whole.norms[2] ** 2))
    assert blocks.cosine == pytest.approx(whole.cosine) and blocks.sign_conflict == pytest.approx(
        whole.sign_conflict
    )
    assert blocks.effective_rank == pytest.approx(whole.effective_rank)


def test_effective_rank_by_hand() -> None:
    found = compare_task_vectors(BASE, [expert([3, 0], [1, 1]), expert([0, 3], [2, 2])])
    assert list(found.table("ab").effective_rank) == pytest.approx([2, 1])
    assert compare_task_vectors(BASE, [BASE, BASE]).effective_rank == 0
    tau = torch.tensor([[3.0, 0, 1, 1], [0, 3, 2, 2]], dtype=torch.float64)
    p = torch.linalg.svdvals(tau) / torch.linalg.svdvals(tau).sum()
    assert found.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())))


def test_the_table_has_a_row_for_each_tensor() -> None:
    table = compare_task_vectors(
        BASE, [expert([3, 4], [0, 0]), expert([3, -4], [0, 2]), expert([0, 0], [0, 0])]
    ).table("xyz")
    assert table.columns.tolist() == [
        "norm x",
        "norm y",
        "norm z",
        "cosine",
        "sign_conflict",
        "effective_rank",
    ]
    assert table.loc["a", "norm x":"norm z"].tolist() == [5, 5, 0]
    assert table.cosine["a"] == pytest.approx(-7 / 25) and table.sign_conflict[
        "a"
    ] == pytest.approx(16 / 25)
    assert np.isnan(table.cosine["b"]) and table.effective_rank["b"] == pytest.approx(1)
    with pytest.raises(UsageError, match="1 labels for 2"):
        compare_task_vectors(BASE, [BASE, BASE]).table(["x"])


def test_layers_are_modules_with_all_their_tensors() -> None:
    base = {
        "up.0.conv.weight": torch.zeros(2, 2),
        "up.0.conv.bias": torch.zeros(2),
        "theta": torch.zeros(3),
    }
    g = torch.Generator().manual_seed(0)
    experts = [{n: torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(2)]
    whole = compare_task_vectors(base, experts)
    layers = whole.by_layer()
    assert layers.names == ("up.0.conv", "theta")
    assert layers.norms[0] == pytest.approx(np.hypot(whole.norms[0], whole.norms[1]))
    assert layers.norms[1] == pytest.approx(whole.norms[2])
    assert layers.cosine == pytest.approx(whole.cosine) and layers.effective_rank == pytest.approx(
        whole.effective_rank
    )


def test_deltas_of_a_lora_are_task_vectors() -> None:
    class Deltas(dict[str, torch.Tensor]):
        holds_deltas = True

    lora = Deltas(a=torch.tensor([3.0, 4.0]))
    found, same = (
        compare_task_vectors(BASE, [lora]),
        compare_task_vectors(BASE, [expert([3, 4], [0, 0])]),
    )
    assert found.norms.tolist() == same.norms.tolist() == [[5], [0]]
    with pytest.raises(InputError, match=r"extra \['c'\]"):
        compare_task_vectors(BASE, [Deltas(c=torch.zeros(1))])
    with pytest.raises(InputError, match="'a' is \\[3\\]"):
        compare_task_vectors(BASE, [Deltas(a=torch.zeros(3))])
