"""Classification that is less sure of its labels.

    loss = (1 - s) CE(y) + s / C sum_c CE(c),        s = 0.1

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
arXiv:1512.00567.
"""

import torch
from torch import Tensor

from fedft.core.tasks import Reduction
from fedft.core.tasks.classification import Classification


class SmoothedClassification(Classification):
    """fedft's classification with label smoothing; columns, metrics and encoding are the same."""

    smoothing = 0.1

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        """The loss of each text, or the mean of those that are scored."""
        scored = self.scored(targets)
        hard = super().loss(outputs, targets, "none")
        even = -outputs.to(hard.dtype).log_softmax(-1).mean(-1)
        each = torch.where(scored, (1 - self.smoothing) * hard + self.smoothing * even, 0.0)
        return each if reduction == "none" else each.sum() / scored.sum()
