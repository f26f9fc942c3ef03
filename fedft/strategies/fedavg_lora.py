"""FedAvg-LoRA (FedIT): average the factors.

    Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning",
    ICASSP 2024, arXiv:2305.05644.

Each site k starts from the global (A, B), trains both, and sends (A_k, B_k). The server takes

    A <- sum_k p_k A_k        B <- sum_k p_k B_k        p_k = n_k / sum_j n_j

over the sites S_t that took part. The frozen weights never change.

The applied update (sum p_k B_k)(sum p_k A_k) is not the mean update sum p_k B_k A_k: the difference
is the aggregation bias that the other rules are about. It vanishes where all A_k, or all B_k, agree.

Wire: pi(r) = sum_modules r (d_in + d_out) numbers down and as many up, plus the head both ways.

Departure from the paper: fully trained tensors (a classifier head) are averaged with the same
weights; the paper's models have none.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies.base import Strategy, mean_of


class FedAvgLoRA(Strategy):
    """Average A, B and the head over the sites, weighted by their examples."""

    name: str = "fedavg-lora"

    @property
    def uses_mean_only(self) -> bool:
        return True

    def supports(self, method: str) -> bool:
        return method != "hydralora"  # whose router it would not train

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        return replace(state, adapter=state.adapter.replaced(mean_of(updates)))
