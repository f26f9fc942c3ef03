"""A rule's turn, and what is held of what it returns, whoever wrote it."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedft.core.errors import ConfigError
from fedft.core.plugins import reference_of
from fedft.core.types import ClientUpdate, ServerState
from fedft.strategies import Strategy
from fedft.strategies.blame import blamed


def aggregated(rule: Strategy, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """The state that a rule makes of a round's updates.

    Args:
        rule: may be anybody's.
        state: that the round started from.
        updates: validated.

    Raises:
        ConfigError: a rule from outside failed, or what it returned is no next state: another type,
            another round, or tensors of another dtype than they had.
    """
    with blamed(rule, f"aggregating round {state.round + 1}"):
        after = rule.aggregate(state, updates)
    if wrong := _fault(state, after):
        raise ConfigError(
            f"the rule {reference_of(type(rule))} returned {wrong}",
            fix="Return the state it was given with its tensors replaced: `state.adapter.replaced(…)`.",
        )
    return after


def _fault(before: ServerState, after: object) -> str | None:
    """What is wrong with a next state; None where nothing is."""
    if not isinstance(after, ServerState):
        return f"{type(after).__name__} for round {before.round + 1}, and a ServerState is expected"
    if after.round != before.round + 1:
        return f"a state of round {after.round} for round {before.round + 1}"
    pairs: tuple[tuple[Mapping[str, Tensor], Mapping[str, Tensor]], ...] = (
        (before.adapter.tensors(), after.adapter.tensors()),
        (before.slots, after.slots),
    )
    for old, new in pairs:
        for name, was in old.items():
            if name in new and new[name].dtype != was.dtype:
                return f"{name} as {new[name].dtype} for round {after.round}; it was {was.dtype}"
    return None
