"""Predicted against measured changes of loss on the digits base; some ten minutes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from demerge.analysis.experts.closed_form import predict, solve_coefficients
from demerge.analysis.experts.responses import Draws, measure_responses
from demerge.analysis.planning.coefficients import merge_groups
from demerge.data import load_images
from demerge.diffusion.model import Diffusion
from demerge.evaluation.metrics.range_losses import range_losses
from demerge.finetuning import FinetuneOptions, finetune
from demerge.merging import MergeSession
from demerge.timesteps import Partition

EXPERTS, WEIGHTS, SAMPLES = 4, 16, 256


@pytest.mark.slow
@pytest.mark.parametrize("per", ["model", "block", "layer"])
def test_predicted_changes_rank_merges_as_other_samples_do(tmp_path: Path, per: Any) -> None:
    """Ranks of the change of loss over random weights: predicted and measured on other draws."""
    base, ranges = Diffusion.load("digits-base"), Partition.uniform(1000, EXPERTS)
    options = FinetuneOptions(
        max_train_steps=150, train_batch_size=32, learning_rate=2e-4, ema_decay=0.99
    )
    for _ in finetune(base, load_images("digits", split="train"), ranges, options, tmp_path):
        pass
    groups = merge_groups(per, base.denoiser)
    session = MergeSession("digits-base", [tmp_path / str(span) for span in ranges], groups=groups)
    test = load_images("digits", split="test")
    found = measure_responses(Draws(base, test, ranges, SAMPLES), session)
    model = base.with_denoiser(copy.deepcopy(base.denoiser))
    origin = range_losses(base, test, ranges, samples=SAMPLES, seed=1)
    chosen = [
        solve_coefficients(found).w,
        *np.random.default_rng(0).uniform(-0.5, 1, size=(WEIGHTS, *session.shape)),
    ]
    predicted, measured = [], []
    for w in chosen:
        session.apply(torch.from_numpy(w), model.denoiser)
        changes = range_losses(model, test, ranges, samples=SAMPLES, seed=1).change(origin)
        measured.append([changes[str(span)].value for span in ranges])
        predicted.append([predict(found, w.ravel()).ranges[str(span)].value for span in ranges])
    rank = [
        float(spearmanr(np.array(predicted)[:, r], np.array(measured)[:, r]).statistic)
        for r in range(EXPERTS)
    ]
    print(f"per {per}: rank correlation of predicted and measured change per range:", rank)
    assert min(rank) > 0
