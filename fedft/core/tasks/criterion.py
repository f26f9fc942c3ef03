"""Cross-entropy as clients train with it where they are asked to: labels smoothed, classes weighed.

With C classes, smoothing e and weights w, an item of class y costs what torch's cross-entropy says,

    (1 - e) w_y (-log p_y) + e / C sum_c w_c (-log p_c)

and a mean over items is divided by the sum of their w_y. Scores at evaluation are neither smoothed nor
weighed: they stay comparable whatever a run trains with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedft.core.errors import MismatchError
from fedft.core.names import hint
from fedft.core.training import LocalTraining


@dataclass(frozen=True)
class Criterion:
    """What changes the cross-entropy of one client in training.

    Attributes:
        smoothing: share of a label that is spread evenly over all classes.
        weights: of each class, in their order; None counts all alike.
    """

    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(cls, training: LocalTraining) -> "Criterion | None":
        """That of a plan whose class weights are numbers by now; None of one that asks for neither."""
        weights = training.class_weights
        if not training.label_smoothing and weights is None:
            return None
        assert weights is None or isinstance(weights, tuple), (
            "class weights by name reached an engine"
        )
        return cls(training.label_smoothing, weights)

    def weigh(self, outputs: Tensor) -> Tensor | None:
        """The weights beside outputs. [C]"""
        if self.weights is None:
            return None
        if len(self.weights) != outputs.shape[-1]:
            raise MismatchError(
                f"there are {len(self.weights)} class weights, and {outputs.shape[-1]} outputs"
            )
        return torch.tensor(self.weights, dtype=outputs.dtype, device=outputs.device)

    def counts(self, targets: Tensor, scored: Tensor) -> Tensor:
        """What each item counts in a mean, zero where it is not scored. [m] float64"""
        if self.weights is None:
            return scored.double()
        table = torch.tensor(self.weights, dtype=torch.float64, device=targets.device)
        return torch.where(scored, table[targets.clamp(min=0)], 0.0)


def check_names(training: LocalTraining, classes: Sequence[str]) -> None:
    """Refuse weights of classes that a run does not have.

    Raises:
        MismatchError: naming one, and the class that was likely meant.
    """
    if not isinstance(training.class_weights, Mapping):
        return
    for name in training.class_weights:
        if name not in classes:
            raise MismatchError(
                f"[training] class-weights: there is no class {name[:100]!r}; {hint(name[:100], classes)}",
                fix="Name classes as the data do; those that are left out count 1.",
            )


def weights_of(
    training: LocalTraining, classes: Sequence[str], targets: NDArray[np.int64]
) -> tuple[float, ...]:
    """Class weights as numbers, in the order of the classes.

    ``balanced`` is scikit-learn's: items / (classes that there are items of * items of the class). A
    class that a client has no item of counts 1, which no item of it makes any use of.

    Args:
        training: that asks for them.
        classes: names of the run's classes.
        targets: of all items that the client trains on; below zero where nothing is scored.

    Raises:
        MismatchError: as :func:`check_names`.
    """
    given = training.class_weights
    if isinstance(given, Mapping):
        check_names(training, classes)
        return tuple(float(given.get(name, 1.0)) for name in classes)
    found = np.bincount(targets[targets >= 0], minlength=len(classes))
    present = int((found > 0).sum())
    return tuple(
        float(found.sum() / (present * count)) if count else 1.0 for count in found.tolist()
    )
