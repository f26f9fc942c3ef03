"""Whether predicted numbers rise with the right ones: the correlation of their ranks."""

# pyright: standard
# scipy has no types.

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedft.core.metrics.base import Metric, Predictions, Tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Spearman(Metric):
    """Spearman's ρ, ties at their mean rank, by scipy; 0 where either side is constant, as Pearson's.

    Not defined where a number is not finite.
    """

    name = "spearman"
    title = "Spearman ρ"
    higher = True
    judges = frozenset({"number"})
    gathers: ClassVar[Mapping[str, Callable[[int], int]]] = {"numbers": lambda classes: 2}

    def gather(self, found: Predictions) -> "Mapping[str, NDArray[np.float64]]":
        """Right and predicted number."""
        import torch

        pairs = [x.double().reshape(len(found.targets)) for x in (found.targets, found.predicted)]
        return {"numbers": torch.stack(pairs, 1).cpu().numpy()}

    def value(self, tally: Tally) -> float:
        import numpy as np
        from scipy.stats import spearmanr

        right, predicted = table = tally.column("numbers").T
        if not np.isfinite(table).all():
            return float("nan")
        if (right == right[0]).all() or (predicted == predicted[0]).all():
            return 0.0
        found: Any = spearmanr(right, predicted)
        return float(found.statistic)
