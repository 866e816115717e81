"""The SNR of a schedule: of abar, and of a config without diffusers."""

from __future__ import annotations

import diffusers
import pytest
import torch

from demerge.diffusion.schedule import MAX_LOG_SNR, log_snr, snr, snr_of


def test_log_snr_is_finite_at_both_ends() -> None:
    abar = torch.tensor([1.0, 0.5, 0.0])
    assert log_snr(abar).tolist() == [MAX_LOG_SNR, 0.0, -MAX_LOG_SNR]


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_config_gives_the_snr_of_its_scheduler(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=kind)
    ratio = snr_of(dict(scheduler.config))
    assert ratio is not None
    torch.testing.assert_close(ratio, snr(scheduler.alphas_cumprod.double()), rtol=2e-3, atol=1e-9)


def test_an_unknown_schedule_has_no_snr() -> None:
    assert snr_of({"beta_schedule": "another"}) is None
