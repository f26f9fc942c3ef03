"""What records beside the adapter must not get around: the promises that a rule, or DP-SGD, makes.

A rule that bounds, compares or covers with noise what a client changed looks at the tensors of the
adapter. A record that travels beside them would pass it unseen, whichever rule of the run asked for
it: such a pair is refused by name.
"""

from collections.abc import Sequence

import torch

from fedft.core.errors import ConfigError
from fedft.core.terms import Term
from fedft.core.types import Adapter, Factors, ServerState, Site, TrainPlan
from fedft.strategies.base import Strategy
from fedft.strategies.blame import blamed

_DP_SGD = "[training] dp adds its noise to the gradients of the adapter alone"


def first_plan(rule: Strategy, rank: int = 1) -> TrainPlan:
    """The rule's plan for the first round, on an adapter of one small layer of this rank."""
    zero = torch.zeros(rank, rank)
    with blamed(rule, "starting"):
        probe: ServerState = rule.init(Adapter({"layer": Factors(zero, zero, 1.0)}))
    with blamed(rule, "planning round 1"):
        return rule.plan(probe, Site("probe", 1))


def check_beside(rule: Strategy, terms: Sequence[Term], *, dp_sgd: bool) -> None:
    """Refuse terms whose records would break a promise of the run.

    Args:
        rule: the run's, with all that it is made of.
        terms: of its plans.
        dp_sgd: whether clients train with DP-SGD.

    Raises:
        ConfigError: a record is sent past a rule of which :attr:`Strategy.guards` says what it
            promises; or, under DP-SGD, a record is sent, or kept for a later round.
    """
    for term in terms:
        sent, held = sorted(term.sends), sorted(term.sends | term.keeps)
        if rule.guards and sent:
            raise _refused(rule.guards, term, sent[0], "would pass it unseen")
        if dp_sgd and held:
            what = "would leave" if held[0] in term.sends else "would be used again"
            raise _refused(_DP_SGD, term, held[0], f"{what} without any")


def _refused(promise: str, term: Term, record: str, what: str) -> ConfigError:
    return ConfigError(
        f"{promise}, and the record {record!r} of the term {term.kind} {what}",
        fix="Leave one of the two out.",
    )
