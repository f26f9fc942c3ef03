"""Central differential privacy, site by site: clip every change, add noise to their sum.

    McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private Recurrent Language Models",
    ICLR 2018, arXiv:1710.06963 (DP-FedAvg with a fixed denominator).
    Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private Learning with Adaptive Clipping",
    NeurIPS 2021, arXiv:1905.03871 (``quantile``).

Each site takes part with probability q, independently of all others (Poisson sampling, which the
server's rounds do for this rule). With D_k what site k sent minus its start, as one vector over all
tensors, and m = q N the *expected* number of sites,

    D = (sum_k D_k min(1, C / ||D_k||) + N(0, (z C)^2 I)) / m          theta <- start + D

and the ``inner`` rule goes on from D as if it were the mean of all replies: that is post-processing
and costs no privacy. One site more or less changes the sum by at most C, whatever it sends, so that
a round is one Gaussian mechanism of noise multiplier z on a Poisson sample of rate q. Sites weigh
the same: weights by examples would multiply the sensitivity. The denominator is fixed, because the
size of the cohort depends on who is in it. An empty round releases noise, as any other does.

With ``quantile`` = g the bound follows that quantile of the norms, from b_k = [||D_k|| <= C]:

    b = (sum_k (b_k - 1/2) + N(0, s^2)) / m + 1/2          C <- C exp(-eta (b - g))

and the changes get noise of z_D = (z^-2 - (2 s)^-2)^(-1/2), so that both releases together cost what
one of multiplier z does.

Clipping, sum and noise are done in whole numbers, see :mod:`fedft.core.privacy.mechanism`; the noise is never
the seed's, see :mod:`fedft.core.privacy.entropy`. The server keeps the account, see :mod:`fedft.server.privacy`.

Departures from the papers: the change is of LoRA factors and head. Under noise the product of two
noisy factors has a term in the product of the noises; FFA-LoRA has one factor to disturb, and is the
default here.

Wire: as the inner rule.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import exp
from typing import Annotated, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedft.core.privacy import entropy
from fedft.core.privacy.mechanism import GaussianSum, Noise
from fedft.core.types import ClientUpdate, ServerState, Site
from fedft.strategies.changes import change_of, norm_of
from fedft.strategies.ffa_lora import FFALoRA
from fedft.strategies.named import AnyStrategy
from fedft.strategies.summary import Summary

_CLIP = "central-dp/clip"


class CentralDP(Summary):
    """The inner rule on the noisy mean of clipped changes.

    Attributes:
        noise_multiplier: z, the noise's standard deviation in units of the bound.
        target_epsilon: where set, ``noise-multiplier`` is solved so that all rounds of the run spend
            this much, and the run stops before it would spend more.
        delta: of the guarantee; below 1 / N.
        clip: C, or where it starts.
        quantile: g, the share of sites that the bound is to leave alone; None keeps C fixed.
        clip_lr: eta, the step of the adaptive bound.
        count_noise: s, the noise on the number of sites below the bound; None is m / 20.
        expected_sites: m; None takes ``[rounds] per-round``, and nothing else is accepted.
        inner: the rule underneath: one that uses the replies through their mean alone.
    """

    name: str = "central-dp"
    # Below and above, accounting takes minutes, to say that nothing is promised, or that nothing can be.
    noise_multiplier: Annotated[float, Field(ge=0.01)] = 1.0
    target_epsilon: Annotated[float, Field(ge=0.001, le=50)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip: PositiveFloat = 1.0
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_lr: PositiveFloat = 0.2
    count_noise: PositiveFloat | None = None
    expected_sites: PositiveInt | None = None
    inner: AnyStrategy = FFALoRA()

    @model_validator(mode="after")
    def _noise_is_left_for_the_changes(self) -> Self:
        if self.quantile is None or self.expected_sites is None:
            return self
        if self.noise_multiplier >= 2 * self.count_deviation:
            raise ValueError(
                f"noise-multiplier = {self.noise_multiplier:.4g} must be below twice the noise on the "
                f"counts, which is {self.count_deviation:.4g}; raise count-noise or per-round"
            )
        return self

    @property
    def guards(self) -> str:
        return f"{self.label} clips the change of the adapter and adds its noise to that"

    @property
    def sites(self) -> int:
        """m, the number of sites a round that the sum is divided by.

        Raises:
            ValueError: it was never said; a configuration that is resolved says it.
        """
        if self.expected_sites is None:
            raise ValueError("central-dp needs expected-sites, the mean number of clients a round")
        return self.expected_sites

    @property
    def count_deviation(self) -> float:
        """s, the standard deviation of the noise on the number of sites below the bound."""
        return self.count_noise if self.count_noise is not None else self.sites / 20

    @property
    def change_multiplier(self) -> float:
        """z_D, the noise multiplier on the changes."""
        if self.quantile is None:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_deviation) ** -2) ** -0.5

    def bound(self, state: ServerState) -> float:
        """C of the coming round."""
        return float(state.slots[_CLIP]) if _CLIP in state.slots else self.clip

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        # Unlike under other rules, a round without replies is a round: that it was empty is a
        # secret too.
        usable = sorted((u for u in updates if u.examples > 0), key=lambda u: u.site)
        return self.checked(replace(state, round=state.round + 1), usable)

    def combine(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        return self.release(state, updates, entropy.gaussian)

    def release(
        self, state: ServerState, updates: Sequence[ClientUpdate], noise: Noise
    ) -> ServerState:
        """One round: a pure function of the replies and the noise.

        Args:
            state: as for :meth:`combine`.
            updates: any number, none too.
            noise: of the operating system, but for tests.
        """
        # The plan of nobody in particular, as it was sent: there may be no reply to read it from.
        plan = self.inner.plan(replace(state, round=state.round - 1), Site("", 1))
        start, C = plan.sent(), self.bound(state)
        size = sum(t.numel() for t in start.values())
        mechanism = GaussianSum(C, self.change_multiplier, size)
        sums = [torch.zeros_like(t, dtype=torch.int64) for t in start.values()]
        below = 0
        for change in map(change_of, updates):
            below += norm_of(change) <= C
            clipped = mechanism.clipped([change[name].unsqueeze(0) for name in start])
            for total, own in zip(sums, clipped, strict=True):
                total += own
        released = mechanism.released(sums, noise)
        tensors = {
            name: (t.double() + noisy / self.sites).to(t.dtype)
            for (name, t), noisy in zip(start.items(), released, strict=True)
        }
        after = self.handed(state, tensors, plan.start)
        if self.quantile is None:
            return after
        return self._adapted(after, self.quantile, C, below, len(updates), noise)

    def _adapted(
        self, after: ServerState, quantile: float, C: float, below: int, count: int, noise: Noise
    ) -> ServerState:
        """With the next bound, a geometric step towards the quantile.

        sum (b_k - 1/2) is a sum of vectors of one number, each within 1/2.
        """
        mechanism = GaussianSum(0.5, 2 * self.count_deviation, 1)
        signs = torch.ones(count, dtype=torch.float64) / 2
        signs[below:] *= -1
        (noisy,) = mechanism.released(mechanism.clipped([signs]), noise)
        share = float(noisy) / self.sites + 0.5
        following = C * exp(-self.clip_lr * (share - quantile))
        slot = torch.tensor(following, dtype=torch.float64)
        return replace(after, slots={**after.slots, _CLIP: slot})
