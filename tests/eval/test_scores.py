"""Scores against closed forms and against torch-fidelity on the same features."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from atc_eval.score.scorer import psnr
from atc_eval.score.statistics import Estimate, FrechetDistance, bootstrap_draws, kernel_distance, precision_recall


def fid(features: Tensor, reference: Tensor) -> float:
    return float(FrechetDistance(reference)(features, np.arange(len(features))[None])[0])


def fid_of_torch_fidelity(features: Tensor, reference: Tensor) -> float:
    statistics = [fid_features_to_statistics(each.double()) for each in (features, reference)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def test_with_equal_covariances_fid_is_the_squared_distance_of_the_means() -> None:
    features, shift = torch.randn(50, 6), torch.tensor([3.0, 0, 0, -4, 0, 0])
    assert fid(features + shift, features) == pytest.approx(25, rel=1e-6)


def test_fid_of_scaled_features() -> None:
    # Sigma and s^2 Sigma about one mean: tr(Sigma + s^2 Sigma - 2 s Sigma) = (s - 1)^2 tr(Sigma).
    features = torch.randn(50, 6).double()
    centred = features - features.mean(dim=0)
    # 44 of 50 eigenvalues vanish but for rounding, whose root is about 1e-8 for each.
    assert fid(3 * centred, centred) == pytest.approx(4 * centred.var(dim=0).sum().item(), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "channels"), [(200, 300, 8), (20, 30, 40), (30, 200, 40), (200, 20, 40)])
def test_fid_is_torch_fidelitys(n: int, m: int, channels: int) -> None:
    mix = torch.randn(channels, channels)
    features, reference = torch.randn(n, channels) @ mix + 1, torch.randn(m, channels) @ mix.flip(0)
    # Where a covariance is singular, torch-fidelity's roots of eigenvalues that should be zero add noise of sqrt(eps).
    assert fid(features, reference) == pytest.approx(fid_of_torch_fidelity(features, reference), rel=1e-5)


def test_fid_of_a_draw_is_that_of_the_features_drawn() -> None:
    features, reference = torch.randn(25, 10), torch.randn(40, 10) + 1
    draws = bootstrap_draws(25, 3)
    replicates = FrechetDistance(reference)(features, draws)
    assert replicates == pytest.approx([fid_of_torch_fidelity(features[draw], reference) for draw in draws], rel=1e-6)


def test_draws_are_with_replacement_and_the_same_every_time() -> None:
    draws = bootstrap_draws(30, 100)
    assert draws.shape == (100, 30)
    assert 0 == draws.min() < draws.max() == 29
    # An image is drawn by (1 - 1/n)^n missing in 36 % of the draws.
    assert np.mean([len(set(draw)) for draw in draws]) == pytest.approx(30 * (1 - (29 / 30) ** 30), abs=1)
    assert np.array_equal(draws, bootstrap_draws(30, 100))


def test_the_interval_of_a_mean_is_the_one_of_theory() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=400)
    estimate = Estimate.of_mean(values, bootstrap_draws(400, 2000))
    assert estimate.value == pytest.approx(values.mean())
    # The deviation of 2000 replicates has itself a relative deviation of 1 / sqrt(4000) = 1.6 %; four of them.
    assert estimate.margin == pytest.approx(1.96 * values.std() / 20, rel=0.064)


def test_a_difference_is_one_only_outside_the_interval() -> None:
    assert [Estimate(value, 0.2).star for value in (0.3, -0.3, 0.1)] == [" *", " *", ""]


def test_kid_is_near_zero_for_one_distribution_and_grows_with_distance() -> None:
    reference = torch.randn(300, 8)
    same, deviation = kernel_distance(torch.randn(200, 8), reference)
    near, far = (kernel_distance(torch.randn(200, 8) + shift, reference)[0] for shift in (0.5, 1.0))
    assert abs(same) < 2 * deviation
    assert 2 * deviation < near < far


def test_precision_and_recall_tell_quality_from_coverage() -> None:
    reference = torch.cat([torch.randn(100, 3), torch.randn(100, 3) + 50])
    precision, recall = precision_recall(torch.randn(100, 3), reference)  # one of two modes
    assert precision > 0.8
    assert 0.4 < recall <= 0.5


def test_psnr_is_that_of_the_mean_square() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(image, image + 5) == pytest.approx(20 * np.log10(255 / 5))


def test_psnr_of_equal_images_is_that_of_rounding() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(image, image) == pytest.approx(10 * np.log10(12 * 255**2))
