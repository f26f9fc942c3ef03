"""FedEx-LoRA: average the factors, and add what the average lost to the base weights.

    Singhal, Ponkshe and Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient
    Fine-Tuning of Large Language Models", ACL 2025, arXiv:2410.09432.

    A <- sum_k p_k A_k    B <- sum_k p_k B_k    W <- W + s E    E = sum_k p_k B_k A_k - B A

so that W + s B A is the base plus exactly the mean update. The residual is the covariance of the
factors over the sites, and its rank is at most (K - 1) r. With any one site j as the origin,

    E = sum_{k != j} p_k (B_k - B) (A_k - A_j)

has just that many rows, and every term vanishes where the sites agree.

Departures from the paper: sites are weighted by their examples (its code takes the plain mean). The
base change since the first round travels in factored form with every plan, since sites are
stateless; it is stored at no more than rank min(d_out, d_in), without loss, and may be cut by an
SVD (``delta_rank``), with loss. The head is averaged.

Wire, round t: pi(r) numbers down and as many up, plus the base change at rank min(d_out, d_in,
delta_rank, sum over all earlier rounds of (K - 1) r), times (d_in + d_out) numbers a layer, down;
plus the head both ways.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import PositiveInt

from fedft.core.types import ClientUpdate, Factors, ServerState
from fedft.strategies.base import Layer, Strategy, grown, layers, mean_of, weighted_sum


class FedExLoRA(Strategy):
    """FedAvg-LoRA with its exact residual merged into the base.

    Attributes:
        delta_rank: the largest rank of the base change; None loses nothing.
    """

    name: str = "fedex-lora"
    delta_rank: PositiveInt | None = None

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        delta = dict(state.delta)
        for layer in layers(updates):
            if len(layer.parts) > 1:
                delta[layer.module] = grown(delta, layer.module, residual(layer), self.delta_rank)
        return replace(state, adapter=state.adapter.replaced(mean_of(updates)), delta=delta)


def residual(layer: Layer) -> Factors:
    """``s E`` at rank (K - 1) r and scale 1, in the sites' dtype."""
    *others, origin = layer.parts
    p, dtype = layer.p[:-1], origin.A.dtype
    A_j = origin.A.double()
    B = weighted_sum([x.B for x in layer.parts], layer.p)
    A = [(w * x.scale * (x.A - A_j)).to(dtype) for w, x in zip(p, others, strict=True)]
    return Factors(torch.cat(A), torch.cat([(x.B - B).to(dtype) for x in others], dim=1), 1.0)
