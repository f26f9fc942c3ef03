"""Whether a state that a rule made can be sent: every number finite and within the wire's range.

A rule can leave that range where its replies did not: a spectrum that is put on B alone is the
product of two factors, momentum adds up, a diverging run doubles every round. What is not noticed
here is committed, sent as infinity, and comes back as NaN from every site.
"""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Iterator

import torch
from torch import Tensor

from fedft.core.errors import ConfigError
from fedft.core.terms import is_entry
from fedft.core.types import LARGEST_SENT, ServerState, factor_name, part_of

NO_RESULT: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
"""What LAPACK says of an input that is not finite."""

REMEDY = (
    "lower [training] lr (or the rule's own lr), or bound what one client may change: "
    "[engine] max-update-norm, or strategy norm-clip around the rule; the last committed round stands"
)
"""What a user can do about a run whose numbers run away."""


def check_sendable(rule: str, before: ServerState, after: ServerState) -> None:
    """Refuse a state that cannot be sent. What ``after`` shares with ``before`` is not read again.

    Args:
        rule: for the message.
        before: that the round started from.
        after: what the rule made of it.

    Raises:
        ConfigError: it is no state, or has other tensors than before; a number of the adapter or the
            base change is not finite, or too large for the wire; one of the rule's own slots is not
            finite.
    """
    _check_form(rule, before, after)
    known = {id(tensor) for _, tensor, _ in _parts(before)}
    for name, tensor, largest in _parts(after):
        if id(tensor) in known or not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)  # either is NaN where any entry is
        if float(low) >= -largest and float(high) <= largest:
            continue
        raise ConfigError(
            f"round {after.round}: {rule} made {name} {_said(float(low), float(high), largest)}",
            fix=REMEDY,
        )


def _check_form(rule: str, before: ServerState, after: object) -> None:
    """Refuse what is not the state's own form: somebody else's rule may give back anything."""
    fix = "Mend the rule: `fedft check-plugin` says which law it breaks. The last round stands."
    if not isinstance(after, ServerState):
        raise ConfigError(
            f"round {before.round}: {rule} gave back a {type(after).__name__}, not a state", fix=fix
        )
    old, new = before.adapter.tensors(), after.adapter.tensors()
    # A rule of cores puts them between the factors in its first round.
    cores = {name for name in new.keys() - old.keys() if part_of(name) == "R"}
    differ = [
        name
        for name in sorted((old.keys() | new.keys()) - cores)
        if name not in old or name not in new or old[name].shape != new[name].shape
    ]
    if differ:
        raise ConfigError(
            f"round {before.round}: {rule} gave back an adapter with other tensors than it was given: "
            f"{', '.join(differ[:3])}",
            fix=fix,
        )


def _said(low: float, high: float, largest: float) -> str:
    most = max(abs(low), abs(high))
    if most != most:
        return "NaN"
    if most == float("inf"):
        return "infinite"
    return f"as large as {most:.3g}, and the wire's number formats end at {largest:.3g}"


def _parts(state: ServerState) -> Iterator[tuple[str, Tensor, float]]:
    """Name, tensor and the largest number it may hold.

    Of the slots only records travel; the others must be finite.
    """
    for name, tensor in state.adapter.tensors().items():
        yield name, tensor, LARGEST_SENT
    for module, f in state.delta.items():
        yield f"the base change {factor_name(module, 'A')}", f.A, LARGEST_SENT
        yield f"the base change {factor_name(module, 'B')}", f.B, LARGEST_SENT
    for name, tensor in state.slots.items():
        most = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else float("inf")
        yield f"its own {name}", tensor, LARGEST_SENT if is_entry(name) else most
