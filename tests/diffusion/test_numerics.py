"""A small model computes with one thread, a larger one or a user's own number is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.diffusion.numerics import LITTLE, fitting_threads, flops
from demerge.finetuning import FinetuneOptions, finetune
from demerge.timesteps import TimestepRange


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_operations_are_those_of_the_layers(tiny: Path) -> None:
    """Two operations per weight and position: conv_in and conv_out alone are 2 * 2 * 9 * 8 * 64."""
    model = Diffusion.load(tiny)
    assert 4 * 9 * 8 * 64 < flops(model) < 2 * 64 * model.parameters


@pytest.mark.parametrize("kind", ["tiny", "tiny_text", "tiny_dit"])
def test_little_work_gets_one_thread(
    kind: str, request: pytest.FixtureRequest, two_threads: None
) -> None:
    model = Diffusion.load(request.getfixturevalue(kind))
    with fitting_threads(model, 4):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with fitting_threads(model, int(LITTLE / flops(model)) + 1):
        assert torch.get_num_threads() == 2


def test_a_number_of_the_user_is_left_alone(
    tiny: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with fitting_threads(Diffusion.load(tiny), 1):
        assert torch.get_num_threads() == 2


def test_finetune_uses_it_and_gives_the_threads_back(
    tiny: Path, tmp_path: Path, two_threads: None
) -> None:
    options = FinetuneOptions(max_train_steps=2, train_batch_size=2)
    data = load_images("digits", split="train", limit=8)
    seen = [
        torch.get_num_threads()
        for _ in finetune(Diffusion.load(tiny), data, [TimestepRange(0, 500)], options, tmp_path)
    ]
    assert (seen, torch.get_num_threads()) == ([1, 1], 2)
