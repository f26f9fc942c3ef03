"""Names that properties of rules had before: rules that users wrote keep working for one release.

A class that declares an old name is read as if it declared the new one, and a class that declares a
new name answers to the old one, so that ``super()`` reaches what was meant. Both say so in a
DeprecationWarning.
"""

import warnings
from typing import Any

RENAMED = {
    "steady": "comparable",
    "mean_only": "uses_mean_only",
    "takes": "supports",
    "buffer": "buffer_size",
}
"""Old name → new name, on :class:`~fedft.strategies.base.Strategy`."""


class _Old:
    """What a class answers under an old name: what that very class declares under the new one."""

    def __init__(self, old: str, declared: Any) -> None:
        self.old, self.declared = old, declared

    def __get__(self, rule: Any, owner: type | None = None) -> Any:
        if rule is None:
            return self
        _say(type(rule).__name__, self.old, stacklevel=2)
        return self.declared.__get__(rule, owner)


def answer_to_old_names(cls: type) -> None:
    """Let a new class of rules be used, and be written, with the names of before."""
    own = vars(cls)
    for old, new in RENAMED.items():
        if old in own and new not in own:
            _say(cls.__name__, old, stacklevel=4)
            setattr(cls, new, own[old])
        elif new in own and old not in own:
            setattr(cls, old, _Old(old, own[new]))


def _say(name: str, old: str, stacklevel: int) -> None:
    warnings.warn(
        f"{name}.{old} is called {RENAMED[old]} now; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
