"""How often an item of a class is given a higher score for it than one that is not of it."""

# pyright: standard
# scikit-learn has no types.

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from fedft.core.extras import extra
from fedft.core.metrics.base import Metric, Predictions, Tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class AUROC(Metric):
    """The area under the ROC curve, by scikit-learn.

    Of two classes it is that of the second one, scored by the difference of the logits, which orders
    items as the probability does and has no ties where that is 1. Of more it is the mean over the
    classes that occur, each against the rest, scored by its probability. Not defined where all items
    are of one class, or a logit is not finite.
    """

    name = "auroc"
    title = "AUROC"
    higher = True
    percent = True
    needs_outputs = True
    judges = frozenset({"class"})
    gathers: ClassVar[Mapping[str, Callable[[int], int]]] = {
        "class-scores": lambda classes: 2 if classes == 2 else 1 + classes
    }

    def gather(self, found: Predictions) -> "Mapping[str, NDArray[np.float64]]":
        """The right class, and the score of each: of two, of the second one alone."""
        import torch

        assert found.outputs is not None
        logits = found.outputs.double()
        two = logits.shape[-1] == 2
        scores = logits[:, 1:] - logits[:, :1] if two else logits.softmax(-1)
        right = found.targets.to(scores.dtype)[:, None]
        return {"class-scores": torch.cat([right, scores], 1).cpu().numpy()}

    def value(self, tally: Tally) -> float:
        import numpy as np

        with extra("metrics", "the metric auroc needs it"):
            from sklearn.metrics import roc_auc_score
        table = tally.column("class-scores")
        if not np.isfinite(table).all():
            return float("nan")
        right, scores = table[:, 0], table[:, 1:]
        classes = [1] if scores.shape[1] == 1 else range(scores.shape[1])
        found: list[float] = []
        for k, one in zip(classes, scores.T, strict=True):
            of_it = right == k
            if 0 < int(of_it.sum()) < len(of_it):
                found.append(float(roc_auc_score(of_it, one)))
        return sum(found) / len(found) if found else float("nan")
