"""raFLoRA: average each rank over the sites that have it, then hand out the SVD.

    Wu, Hu, Min and Wang, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client
    Heterogeneity", 2026, arXiv:2602.13486.

Weighting all sites alike lets a rank that few sites hold shrink by their share of the weight every
round, until the global update has collapsed to the smallest rank. Here the update is cut into
blocks (l, h] at the ranks of the fleet, and each is averaged over the sites that reach it:

    dW = sum_(l,h]  sum_{k: r_k >= h} n_k / N_h  s_k B_k[:, l:h] A_k[l:h]     N_h = sum_{k: r_k >= h} n_k
    dW = U S V^T        A = V_R^T        B = U_R S_R / s

Since a site takes part in a block in whole or not at all, the weight of rank i of site k is
n_k [r_k >= i] / sum_j n_j [r_j >= i]: no list of levels is needed.

State: experimental, as the paper's abstract alone could be read.

Departures from the paper, of which abstract and notes were read: ranks that no site of the round
holds keep the server's present components (ours; without it, one cohort of small sites would erase
what the large ones learned). Fresh directions get a unit row in A, as in FlexLoRA. The head is
averaged over all sites.

Wire: as FlexLoRA, r_k (d_in + d_out) numbers a layer each way, plus the head.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedft.core import algebra
from fedft.core.types import ClientUpdate, Factors, Part, ServerState, Site, TrainPlan
from fedft.strategies.base import Layer, Strategy, at_rank, layers, rebuilt, spectral


class RaFLoRA(Strategy):
    """Rank-partitioned averaging of the products."""

    name: str = "raflora"

    @property
    def mixed_ranks(self) -> bool:
        return True

    @property
    def comparable(self) -> frozenset[Part]:
        return frozenset({"head"})

    def plan(self, state: ServerState, site: Site) -> TrainPlan:
        return TrainPlan(start=at_rank(state.adapter, site.rank), delta=state.delta)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        found: dict[str, Factors] = {}
        for layer in layers(updates):
            old = state.adapter.factors[layer.module]
            triplets = algebra.top_svd(partitioned(layer, old), old.rank)
            found[layer.module] = spectral(triplets, old.rank, old)
        return replace(state, adapter=rebuilt(state, found, updates))


def partitioned(layer: Layer, old: Factors) -> Factors:
    """The rank-partitioned mean as a stack; ``old`` gives the ranks that nobody holds."""
    examples = torch.tensor([u.examples for u in layer.holders], dtype=torch.float64)
    ranks = torch.tensor([x.rank for x in layer.parts])
    reaches = ranks[:, None] > torch.arange(int(ranks.max()))  # [K, max r_k]
    share = examples[:, None] * reaches
    share = share / share.sum(dim=0)
    weighed = [
        Factors(w[: x.rank, None] * x.A.double(), x.B.double(), x.scale)
        for w, x in zip(share, layer.parts, strict=True)
    ]
    rest = Factors(
        old.A[reaches.shape[1] :].double(), old.B[:, reaches.shape[1] :].double(), old.scale
    )
    return algebra.stack([*weighed, rest] if rest.rank else weighed)
