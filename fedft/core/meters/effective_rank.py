"""Effective rank: how many directions the fine-tuned change of each layer really uses.

Of the singular values sigma of W_t - W_0 = delta + s B A, the change of a layer's weights since the
pretrained model,

    q_i = sigma_i / sum_j sigma_j        erank = exp(-sum_i q_i ln q_i)

from 1, one direction, to the rank of the matrix, all directions alike. It is the same at any scale
of the adapter. A model whose effective rank falls from round to round collapses: rank is paid for,
sent and not used, which rules for mixed ranks are prone to (see raFLoRA).

O. Roy and M. Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.

Cost per layer of width d and rank r (of the delta and the adapter together): two QRs of [d, r] and an
SVD of [r, r]; above the width of the layer, an SVD of the layer.
"""

# torch is typed in part.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from math import exp
from typing import TYPE_CHECKING, TypedDict

from fedft.core.meters.base import Meter, Round
from fedft.core.meters.plots import ROUNDING, Curve, Heat, Plot

if TYPE_CHECKING:
    from fedft.core.types import Factors


class EffectiveRankReading(TypedDict):
    """Effective ranks of the global model's change.

    Attributes:
        mean: over the layers that have changed; None where none has.
        layers: module path → its own; None where it is as it was, or not finite.
    """

    mean: float | None
    layers: dict[str, float | None]


class EffectiveRank(Meter):
    """Reads the server's state alone, and so works under any way of collecting replies."""

    key = "effective_rank"
    plots = (
        Plot(
            title="Effective rank",
            quantity="Directions a layer, mean",
            low=0.0,
            caption="How many directions the change of a layer since the pretrained model uses: the "
            "exponential of the entropy of its singular values.",
            curves=(
                Curve(
                    keys=("mean",),
                    label="Mean over the layers",
                    name="Effective rank, mean over the layers",
                    title="Effective rank per round",
                    caption="Directions that the change of a layer uses: the exponential of the entropy "
                    "of its singular values.",
                    column="Effective rank",
                ),
            ),
            heat=Heat(("layers",), (), "Effective rank by layer", "Effective rank"),
        ),
    )

    def value(self, round_: Round) -> EffectiveRankReading:
        """``mean``, and each of ``layers``."""
        adapter, delta = round_.after.adapter.factors, round_.after.delta
        layers = {
            module: effective_rank([terms[module] for terms in (delta, adapter) if module in terms])
            for module in dict.fromkeys([*adapter, *delta])
        }
        known = [value for value in layers.values() if value is not None]
        return EffectiveRankReading(mean=sum(known) / len(known) if known else None, layers=layers)


def effective_rank(terms: "Sequence[Factors]") -> float | None:
    """Of the sum of some products; None where nothing but rounding is left of it, or it is not finite.

    Args:
        terms: factors of one layer, at least one.
    """
    import torch

    from fedft.core import algebra
    from fedft.core.meters.gaps import summed

    whole = summed(terms, terms[0].shape)
    if not (torch.isfinite(whole.A).all() and torch.isfinite(whole.B).all()):
        return None
    values = algebra.singular_values(whole)
    if float(values.norm()) <= ROUNDING * sum(map(algebra.norm, terms)):
        return None  # what was merged into the base undoes the adapter, as at the start of PiSSA
    q = values / values.sum()
    return exp(-float(torch.xlogy(q, q).sum()))
