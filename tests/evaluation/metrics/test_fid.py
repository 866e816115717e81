from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from demerge.errors import InputError, NumericalError, UsageError
from demerge.evaluation.metrics import fid
from demerge.evaluation.metrics.fid import (
    Moments,
    frechet_distance,
    load_moments,
    moments,
    save_moments,
    square_root,
)


def features(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    return (
        torch.randn(n, d, generator=generator) @ mixing + torch.randn(d, generator=generator)
    ) * scale


def oracle(x: torch.Tensor, y: torch.Tensor) -> float:
    a, b = x.double().numpy(), y.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


def test_one_dimension_by_hand() -> None:
    a = Moments(
        torch.tensor([1.0], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64), 10
    )
    b = Moments(
        torch.tensor([4.0], dtype=torch.float64), torch.tensor([[9.0]], dtype=torch.float64), 10
    )
    assert frechet_distance(a, b) == pytest.approx((1 - 4) ** 2 + (2 - 3) ** 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e3]))
def test_agrees_with_sqrtm(d: int, seed: int, scale: float) -> None:
    x, y = features(5 * d, d, seed, scale), features(7 * d, d, seed + 1, scale)
    distance = frechet_distance(moments([x]), moments([y]))
    assert distance == pytest.approx(oracle(x, y), rel=1e-6)
    assert distance == pytest.approx(frechet_distance(moments([y]), moments([x])), rel=1e-9)


def test_zero_for_equal_moments_even_when_singular() -> None:
    x = moments([features(5, 20, 0)])
    assert frechet_distance(x, x) == 0
    assert frechet_distance(x, Moments(x.mean.clone(), x.covariance.clone(), 5)) == 0


def test_a_known_root_changes_nothing() -> None:
    x, y = moments([features(50, 6, 0)]), moments([features(60, 6, 1)])
    assert frechet_distance(x, y, root=square_root(x.covariance)) == frechet_distance(x, y)


def test_moments_do_not_depend_on_batches_nor_cancel() -> None:
    x = features(101, 7, 3).double() + 1e7
    whole, parts = moments([x]), moments(x.split(8))
    torch.testing.assert_close(whole.covariance, parts.covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-6)
    assert whole.n == parts.n == 101


def test_bad_moments_are_refused() -> None:
    with pytest.raises(UsageError, match="1 samples"):
        moments([torch.zeros(1, 4)])
    with pytest.raises(UsageError, match="0 samples"):
        moments([])
    with pytest.raises(NumericalError, match="NaN"):
        moments([torch.full((3, 2), float("nan"))])
    with pytest.raises(UsageError, match="do not fit"):
        Moments(torch.zeros(3), torch.zeros(2, 2), 5)
    with pytest.raises(UsageError, match="do not compare"):
        frechet_distance(moments([features(9, 2, 0)]), moments([features(9, 3, 0)]))


def test_npz_round_trip_and_the_keys_of_pytorch_fid(tmp_path: Path) -> None:
    value = moments([features(20, 4, 0)], {"preprocess": "clean"})
    save_moments(tmp_path / "stats.npz", value)
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["mu"], value.mean.numpy())
        np.testing.assert_array_equal(file["sigma"], value.covariance.numpy())
    again = load_moments(tmp_path / "stats.npz")
    assert (again.n, dict(again.protocol)) == (20, {"preprocess": "clean"})
    assert frechet_distance(value, again) == 0


def test_foreign_npz_needs_n_and_hostile_ones_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2), n=9)
    (tmp_path / "text.npz").write_text("PK no zip")
    with pytest.raises(InputError, match="how many images"):
        load_moments(tmp_path / "plain.npz")
    assert load_moments(tmp_path / "plain.npz", n=50_000).n == 50_000
    for name in ("pickle", "nan", "text", "absent"):
        with pytest.raises(InputError, match=f"{name}.npz"):
            load_moments(tmp_path / f"{name}.npz")


def test_what_is_no_covariance_is_refused(tmp_path: Path) -> None:
    lopsided = np.eye(3)
    lopsided[0, 1] = 0.5
    cases = {
        "lopsided": ({"mu": np.zeros(3), "sigma": lopsided}, "symmetric"),
        "negative": ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "symmetric"),
        "narrow": ({"mu": np.zeros(3), "sigma": np.eye(2)}, "do not fit"),
        "words": ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "numbers"),
        "others": ({"reps": np.zeros((4, 3))}, "reps"),
    }
    for name, (arrays, words) in cases.items():
        np.savez(tmp_path / f"{name}.npz", n=9, **arrays)
        with pytest.raises(InputError, match=f"{name}.npz.*{words}"):
            load_moments(tmp_path / f"{name}.npz")
    np.save(tmp_path / "array.npy", np.eye(3))
    with pytest.raises(InputError, match=r"array\.npy"):
        load_moments(tmp_path / "array.npy")


def test_the_images_of_a_file_of_statistics_are_not_read(tmp_path: Path) -> None:
    """ADM's reference files hold mu, sigma and 10,000 images, which may be pickled or damaged."""
    np.savez(
        tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=np.array([{}], dtype=object)
    )
    assert load_moments(tmp_path / "adm.npz", n=50_000).n == 50_000


def test_an_array_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fid, "MAX_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", b"")
        archive.writestr("sigma.npy", bytes(2 << 20))
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 14
    with pytest.raises(InputError, match="sigma takes 2,097,152 bytes"):
        load_moments(tmp_path / "bomb.npz")


def test_statistics_of_cifar10_as_pytorch_fid_writes_them(
    asset: Callable[[str], Path], tmp_path: Path
) -> None:
    """An npz {mu, sigma} without n, of the train split of CIFAR-10 under Inception."""
    found = load_file(asset("cifar10-base/cifar10-train-inception.safetensors"))
    mu, upper = found["mu"].double().numpy(), found["sigma_upper"].double().numpy()
    sigma = np.zeros((len(mu), len(mu)))
    sigma[np.triu_indices(len(mu))] = upper
    sigma += np.triu(sigma, 1).T
    np.savez(tmp_path / "cifar10.npz", mu=mu, sigma=sigma)
    value = load_moments(tmp_path / "cifar10.npz", n=50_000)
    assert value.dim == 2048
    shifted = Moments(value.mean + 0.01, value.covariance, 50_000)
    assert frechet_distance(value, shifted) == pytest.approx(2048 * 1e-4, rel=1e-6)
