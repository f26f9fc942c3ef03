"""SCAFFOLD at the client: control variates against client drift.

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    ICML 2020, arXiv:1910.06378; option II.

With y_t the client's weights, x their start, c the server's control variate and c_k the client's own,
each of its T steps takes ``g_t + c - c_k`` in place of its gradient g_t, and then

    c_k <- c_k - c + (x - y_T) / (T lr)        which, for steps y - lr (g_t + c - c_k),
         = 1/T sum_t g_t

The second form is what is computed. It is the paper's, number for number, under plain SGD. Under
momentum, AdamW, weight decay or clipping, ``(x - y_T) / (T lr)`` is no mean of gradients and could not
be subtracted from one; the mean of g_t still is. Where all clients' corrected gradients agree they
take the same steps under any optimiser, which is what the correction is for; the paper's rates are
proved for plain SGD alone.

g_t is the gradient of the loss (with DP-SGD, the noisy one that is released), without the penalties of
other methods. A client without a step keeps its c_k.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedft.clients.methods.base import Method, Rows, column
from fedft.core.terms import ControlVariates as Term


class ControlVariates(Method):
    """See :class:`fedft.core.terms.ControlVariates`."""

    term = Term

    def __init__(self, rows: Rows, terms: Sequence[Term | None]) -> None:
        self._own = rows.laid("own-control")
        self._correction = rows.laid("control") - self._own
        self._sum = torch.zeros_like(rows.theta)

    def correct(self, rows: Rows, count: int) -> None:
        self._sum[:count] += rows.grad[:count]
        rows.grad[:count] += self._correction[:count]

    def end(self, rows: Rows, steps: Sequence[int]) -> Mapping[str, Tensor]:
        mean = self._sum / column(rows, [max(n, 1) for n in steps])
        new = torch.where(column(rows, list(map(float, steps))) > 0, mean, self._own)
        return {"own-control": new, "control-change": new - self._own}
