"""Whiten: the covariance becomes the identity; scikit-learn's and the oracle's matrices; degenerate data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from parity_tests.oracle import data as oracle
from reimpl.data import Standardize, Whiten
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator

pytestmark = pytest.mark.quick


def correlated(n: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows whose covariance is well conditioned (eigenvalues between about 0.1 and 10) and far from diagonal."""
    generator = seeded_generator(seed, "whiten", n, features)
    basis = torch.linalg.qr(random_tensor((features, features), torch.float64, generator)).Q
    scales = torch.logspace(-0.5, 0.5, features, dtype=torch.float64)
    x = random_tensor((n, features), torch.float64, generator) * scales @ basis.mT
    return (x + 3 * random_tensor((features,), torch.float64, generator)).to(dtype)


def covariance(x: Tensor) -> Tensor:
    x = x.double()
    x = x - x.mean(0)
    return x.mT @ x / len(x)


@pytest.mark.parametrize("method", ["pca", "zca"])
@pytest.mark.parametrize("features", [1, 2, 16, 64])
def test_covariance_is_the_identity_in_float32(features: int, method: str, device: torch.device) -> None:
    for seed in SEEDS:
        x = correlated(4000, features, seed, torch.float32).to(device)
        transform = Whiten(method).to(device).fit(x)
        y = transform(x)
        identity = torch.eye(features, dtype=torch.float64, device=device)
        assert y.dtype == torch.float32 and transform.rank == features
        assert (covariance(y) - identity).abs().max() < 1e-5
        assert y.mean(0).abs().max() < 1e-5
        torch.testing.assert_close(transform.inverse(y), x, rtol=1e-5, atol=1e-5)  # float32, condition number 10


@pytest.mark.parametrize("correction", [0, 1])
def test_matrices_against_the_oracle(correction: int, device: torch.device) -> None:
    for seed in SEEDS:
        x = correlated(300, 6, seed)
        pca = Whiten("pca", correction=correction).fit(x.to(device))
        zca = Whiten("zca", correction=correction).fit(x.to(device))
        matrix, variances = oracle.pca_whitening(x.numpy(), correction)
        # eigenvectors lose digits to the gaps between the eigenvalues, here at least a hundredth of the largest
        torch.testing.assert_close(pca.whitening, torch.from_numpy(matrix), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pca.variances, torch.from_numpy(variances), rtol=1e-12, atol=0)
        root = torch.from_numpy(oracle.zca_whitening(x.numpy(), correction))
        torch.testing.assert_close(zca.whitening, root, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(zca.coloring @ zca.whitening, torch.eye(6, dtype=torch.float64))


def test_pca_against_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="the reference is scikit-learn's")
    x = correlated(500, 5)
    theirs = decomposition.PCA(whiten=True, svd_solver="full").fit(x.numpy())
    ours = Whiten("pca", correction=1).fit(x)
    torch.testing.assert_close(ours.variances, torch.from_numpy(theirs.explained_variance_), rtol=1e-12, atol=0)
    expected = torch.from_numpy(theirs.transform(x.numpy()))
    # scikit-learn's choice of a vector's sign has changed between its releases
    signs = (ours(x) * expected).sum(0).sign()
    torch.testing.assert_close(ours(x), expected * signs, rtol=1e-10, atol=1e-10)


def test_zca_stays_nearest_to_the_data() -> None:
    """Of all whitenings of standardised data none correlates more with the data, and the matrix is symmetric."""
    x = correlated(400, 5)
    x = Standardize().fit(x)(x)
    zca, pca = Whiten("zca").fit(x), Whiten("pca").fit(x)
    torch.testing.assert_close(zca.whitening, zca.whitening.mT)
    nearness = [(transform(x) * x).mean() for transform in (zca, pca)]
    assert nearness[0] > nearness[1]


def test_standardising_is_not_whitening() -> None:
    """Erratum N0.3: mean 0 and variance 1 leave the correlations, which whitening removes."""
    x = correlated(400, 3)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    standardised = covariance(Standardize().fit(x)(x))
    torch.testing.assert_close(standardised.diagonal(), torch.ones(3, dtype=torch.float64))
    assert standardised[0, 1] > 0.9
    # eps of float64 times the covariance's condition number, about 10⁴
    torch.testing.assert_close(covariance(Whiten().fit(x)(x)), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["pca", "zca"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_and_collinear_features_do_not_blow_up(method: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        free = correlated(500, 3, seed)
        constant = torch.full((500, 1), 0.1, dtype=torch.float64)
        x = torch.cat([free, constant, free[:, :1] * 0.3 + free[:, 1:2] / 7, free[:, 2:]], 1).to(dtype)
        transform = Whiten(method).fit(DataLoader(TensorDataset(x), 64))
        y = transform(x)
        assert transform.rank == 3 and y.isfinite().all() and y.abs().max() < 10
        values = torch.linalg.eigvalsh(covariance(y))
        expected = torch.tensor([0.0] * 3 + [1.0] * 3, dtype=torch.float64)
        # float32 data, of which a projection on the three directions is left
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(transform.inverse(y), x, rtol=1e-5, atol=1e-5)


def test_rounding_under_an_offset_is_no_direction() -> None:
    """At 1,000 float32 rounds a sum of two features by 3e-5, far above what float64 sees, and it must stay noise."""
    for seed in SEEDS:
        free = correlated(500, 2, seed)
        x = torch.cat([free, free.sum(1, keepdim=True) / 2], 1).float() + 1000
        whole = Whiten().fit(x)
        parts = Whiten().merge(*(Whiten().fit(part) for part in x.split(100)))
        assert whole.rank == parts.rank == 2 and whole(x).abs().max() < 10
        assert Whiten().fit(x.double() - 1000).rank == 3  # taken at its word in float64


def test_features_of_very_different_scales_all_count() -> None:
    x = correlated(1000, 3, dtype=torch.float64) * torch.tensor([1e6, 1.0, 1e-1], dtype=torch.float64)
    transform = Whiten().fit(x.float())
    assert transform.rank == 3
    # the condition number of the data, 10⁷, times eps of float64
    assert (covariance(transform(x)) - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-3


def test_fewer_examples_than_features() -> None:
    x = correlated(5, 12)
    transform = Whiten("pca").fit(x)
    assert transform.rank == 4 and (transform(x)[:, 4:] == 0).all()
    torch.testing.assert_close(covariance(transform(x)[:, :4]), torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(transform.inverse(transform(x)), x)


def test_all_constant_and_too_few() -> None:
    x = torch.full((5, 2), 0.1)
    transform = Whiten().fit(x)
    assert transform.rank == 0 and (transform(x) == 0).all() and (transform(x + 1) == 0).all()
    with pytest.raises(ValueError, match="whitening needs at least two examples, got 1"):
        Whiten().fit(x[:1])
    with pytest.raises(ValueError, match="more than 3 values"):
        Whiten(correction=3).fit(x[:2])


def test_eps_keeps_small_directions_small() -> None:
    x = correlated(500, 4)
    transform = Whiten("pca", eps=2.0).fit(x)
    expected = transform.variances / (transform.variances + 2)
    torch.testing.assert_close(covariance(transform(x)).diagonal(), expected)
    torch.testing.assert_close(transform.inverse(transform(x)), x)


@pytest.mark.parametrize("method", ["pca", "zca"])
def test_images_as_vectors_and_pixels_as_examples(method: str) -> None:
    x = correlated(640, 12)
    images = x.reshape(640, 3, 2, 2)
    whole = Whiten(method, dim=(1, 2, 3)).fit(images)
    flat = Whiten(method).fit(x)
    torch.testing.assert_close(whole(images).flatten(1), flat(x))
    torch.testing.assert_close(whole.inverse(whole(images)), images)
    channels = Whiten(method, dim=1).fit(images)
    y = channels(images).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(covariance(y), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert int(channels.count) == 640 * 4


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"method must be one of \('pca', 'zca'\), got 'ica'"):
        Whiten("ica")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim must name at least one dimension"):
        Whiten(dim=())
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must be at least 0"):
            Whiten(eps=eps)


def test_the_oracle_whitens() -> None:
    x = correlated(300, 6).numpy()
    for matrix in (oracle.pca_whitening(x)[0], oracle.zca_whitening(x)):
        y = (x - x.mean(axis=0)) @ matrix.T
        np.testing.assert_allclose(y.T @ y / len(y), np.eye(6), atol=1e-12)
