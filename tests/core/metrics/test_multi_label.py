"""Metrics over several labels an item: by hand, and as scikit-learn has them."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from fedft.core.metrics import METRICS, Predictions, Sums, Tally

NAMES = ("label-micro-f1", "label-macro-f1", "subset-accuracy")


def tally(predicted: Tensor, right: Tensor) -> Tally:
    found = Predictions(torch.zeros(len(right)), predicted, right, right.shape[1])
    sums: dict[str, Sums] = {}
    for name in NAMES:
        sums |= METRICS[name].tally(found)  # type: ignore[arg-type]
    return Tally(0.0, len(right), sums)  # type: ignore[arg-type]


def test_by_hand() -> None:
    right = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    predicted = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0]])
    found = tally(predicted, right)
    assert found.sums["label-counts"] == (2, 0, 0, 0, 0, 1, 0, 1, 0)
    micro, macro, exact = (METRICS[name].value(found) for name in NAMES)
    assert micro == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert macro == pytest.approx(1 / 3)
    assert exact == pytest.approx(2 / 3)


def odd(kind: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    right = (torch.rand(97, 5, generator=rng) < 0.3).float()
    predicted = (torch.rand(97, 5, generator=rng) < 0.4).float()
    match kind:
        case "a class that is nowhere":
            right[:, 2] = predicted[:, 2] = 0
        case "nothing is right":
            right[:] = 0
        case "nothing is predicted":
            predicted[:] = 0
        case "one item":
            right, predicted = right[:1], predicted[:1]
        case "one class":
            right, predicted = right[:, :1], predicted[:, :1]
        case "all right":
            predicted = right.clone()
        case _:
            assert kind == "random"
    return predicted, right


@pytest.mark.parametrize(
    "kind",
    [
        "random", "a class that is nowhere", "nothing is right", "nothing is predicted", "one item",
        "one class", "all right",
    ],
)  # fmt: skip
def test_as_scikit_learn_in_slices_and_whole(kind: str) -> None:
    predicted, right = odd(kind, torch.Generator().manual_seed(len(kind)))
    total = Tally.total(
        tally(p, r) for p, r in zip(predicted.split(10), right.split(10), strict=True)
    )
    assert total == tally(predicted, right)
    y, p = right.numpy(), predicted.numpy()

    def f1(average: str) -> float:
        if y.shape[1] == 1:  # scikit-learn takes one column for one class of two
            found = f1_score(y.ravel(), p.ravel(), zero_division=0)
            return float(found)
        return float(f1_score(y, p, average=average, zero_division=0))

    expected = [f1("micro"), f1("macro"), float(accuracy_score(y, p))]
    for name, value in zip(NAMES, expected, strict=True):
        assert abs(METRICS[name].value(total) - value) <= 1e-12, name
