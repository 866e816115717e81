"""Task vectors: numbers by hand, and keys that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demerge.analysis.taskvectors import task_vectors
from demerge.errors import InputError, UsageError

BASE = {"a": torch.tensor([1.0, 1.0]), "b": torch.zeros(1, 2), "steps": torch.tensor(3)}


def expert(a: list[float], b: list[float]) -> dict[str, torch.Tensor]:
    return {"a": BASE["a"] + torch.tensor(a), "b": torch.tensor([b]), "steps": torch.tensor(9)}


def test_norms_cosines_and_sign_conflict_by_hand() -> None:
    found = task_vectors(BASE, [expert([3, 4], [0, 0]), expert([3, -4], [0, 2])])
    assert found.names == ("a", "b")
    assert found.norms.tolist() == [[5, 5], [0, 2]]
    assert found.cosine == pytest.approx(np.array([[1, -7 / (5 * 29**0.5)], [-7 / (5 * 29**0.5), 1]]))
    assert found.sign_conflict == pytest.approx(np.array([[0, 16 / 25], [16 / 25, 0]]))


def test_an_unchanged_expert_has_no_direction() -> None:
    found = task_vectors(BASE, [expert([0, 0], [0, 0]), expert([1, 0], [0, 0])])
    assert np.isnan(found.cosine[0]).all() and found.cosine[1, 1] == 1 and np.isnan(found.sign_conflict[0, 1])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"missing \['b'\], extra \['c'\]"):
        task_vectors(BASE, [{"a": BASE["a"], "c": BASE["b"], "steps": BASE["steps"]}])
    with pytest.raises(InputError, match="'a' is \\[3\\]"):
        task_vectors(BASE, [{**BASE, "a": torch.zeros(3)}])
    with pytest.raises(UsageError):
        task_vectors(BASE, [])
