"""Metrics of numbers: as scipy and scikit-learn have them."""

import math

import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error
from torch import Tensor

from fedft.core.metrics import METRICS, Predictions, Tally


def tally(predicted: Tensor, right: Tensor) -> Tally:
    found = Predictions(torch.zeros(len(right)), predicted, right, 1)
    sums = {**METRICS["mae"].tally(found), **METRICS["pearson"].tally(found)}
    return Tally(0.0, len(right), sums)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("related", [0.0, 0.1, 1.0, -3.0])
def test_as_their_libraries_in_slices_and_whole(
    scale: float, dtype: torch.dtype, related: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    right = (torch.randn(301, generator=rng, dtype=torch.float64) + 1) * scale
    noise = torch.randn(301, generator=rng, dtype=torch.float64) * scale
    predicted = (related * right + noise).to(dtype)
    right = right.float()  # as examples hold them
    total = Tally.total(
        tally(p, r) for p, r in zip(predicted.split(40), right.split(40), strict=True)
    )
    p, t = predicted.double().numpy(), right.double().numpy()
    assert METRICS["mae"].value(total) == pytest.approx(float(mean_absolute_error(t, p)), rel=1e-12)
    assert abs(METRICS["pearson"].value(total) - float(pearsonr(p, t).statistic)) <= 1e-12
    whole = tally(predicted, right)
    assert abs(METRICS["pearson"].value(total) - METRICS["pearson"].value(whole)) <= 1e-12


def test_perfect_predictions_correlate_by_one_and_no_more() -> None:
    for seed in range(50):
        right = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        for sign in (1.0, -1.0):
            value = METRICS["pearson"].value(tally(sign * right, right))
            assert abs(value) <= 1.0 and value == pytest.approx(sign, abs=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_correlation(value: float) -> None:
    right = torch.randn(30, generator=torch.Generator().manual_seed(0))
    broken = right.clone()
    broken[3] = value
    assert math.isnan(METRICS["pearson"].value(tally(broken, right)))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_what_is_constant_correlates_with_nothing(value: float) -> None:
    right = torch.randn(30, generator=torch.Generator().manual_seed(0))
    constant = torch.full((30,), value)
    assert METRICS["pearson"].value(tally(constant, right)) == 0.0
    assert METRICS["pearson"].value(tally(right, constant)) == 0.0
    assert METRICS["pearson"].value(tally(right[:1], right[:1])) == 0.0
