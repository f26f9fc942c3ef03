"""DP-SGD: local training that protects each example of a client.

    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv:1607.00133.

A step's batch is a Poisson sample of the client's examples, of mean size b. With g_i the gradient of
example i's own loss over all trained tensors as one vector, C the bound and z the noise multiplier,

    g = (sum_i g_i min(1, C / ||g_i||) + N(0, (z C)^2 I)) / b

takes the place of the gradient; the optimiser goes on from there. An empty batch is a step of noise.

Clipping, sum and noise are those of :mod:`fedft.core.privacy.mechanism`, the random numbers those of
:mod:`fedft.core.privacy.entropy`. What other methods add (proximal term, tail penalty) depends on
weights and records alone, and is added after the noise.

What a client reports beside its tensors would not be covered by the noise: it reports the number of
its steps, which is no secret, and neither loss nor gradient norms.
"""

from collections.abc import Sequence

import torch

from fedft.clients.methods.base import Losses, Method, Rows
from fedft.core.privacy import entropy
from fedft.core.privacy.mechanism import GaussianSum
from fedft.core.terms import DPSGD as Term


class DPSGD(Method):
    """See :class:`fedft.core.terms.DPSGD`.

    Raises:
        ConfigError: no noise can be made of these figures.
    """

    term = Term
    makes_gradient = by_example = silent = True

    def __init__(self, rows: Rows, terms: Sequence[Term | None]) -> None:
        (term,) = (t for t in terms if t is not None)  # by example means one client at a time
        self._mechanism = GaussianSum(term.clip, term.noise, rows.theta.shape[1])
        self._batch_size = rows.plans[0].training.batch_size

    def gradient(self, rows: Rows, losses: Losses) -> bool:
        sums = self._mechanism.clipped(losses.by_example())
        released = self._mechanism.released(sums, entropy.gaussian)
        mean = torch.cat([total.reshape(-1) for total in released]) / self._batch_size
        rows.grad[0].copy_(mean)
        return True
