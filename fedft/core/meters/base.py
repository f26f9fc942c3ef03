"""What a meter is: a reading of every round that changes nothing.

A meter says what it needs of the replies, and is given no more:

    sum         what a secure sum over the clients gives: the mean of what they sent, and means of
                numbers that each works out from its own reply. No reply is seen.
    products    also the mean of their products B_k A_k, and what they started from
    each        every reply, one by one, and the sums of squares over them

``each`` is not more than ``products``: a meter that is shown every reply makes of it what it wants,
and a product that nobody asked for is not multiplied out. The server folds the replies as they
come and holds none of them (see :mod:`fedft.core.folding`); a meter that is given each keeps what it
has made of it, never the reply: its memory must not grow with the clients.

To add one, write a file with a subclass of :class:`Meter` and add it to the table in
``fedft/core/meters/__init__.py``; the laws of ``tests/core/meters`` then hold it to what it says.

Nothing here, and nothing at the top of a meter's file, imports torch: reports read how a meter is
drawn, and must not pay for it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, get_args

from fedft.core.errors import ConfigError
from fedft.core.meters.plots import Plot

if TYPE_CHECKING:
    from torch import Tensor

    from fedft.core.folding import Folded
    from fedft.core.types import ClientUpdate, Factors, Part, ServerState, TrainPlan

Needs = Literal["sum", "products", "each"]
"""What a meter needs of the replies; see the head of this module."""

When = Literal["round", "evaluation"]
"""When a meter is read: after every round, or where the model is evaluated."""

T = TypeVar("T")

_KEY = re.compile(r"[a-z][a-z0-9_-]{0,39}")


class Replies:
    """What a meter is given of a round's replies: as much as it declares.

    Args:
        folded: the replies.
        needs: what the meter declares.
    """

    def __init__(self, folded: "Folded", needs: Needs) -> None:
        self._folded, self._needs = folded, needs

    # sum

    @property
    def examples(self) -> int:
        """Of all clients that count; zero where none does."""
        return self._folded.examples

    @property
    def hidden(self) -> "frozenset[Part]":
        """The factors that stay at the clients (FedSA-LoRA keeps B): nobody knows the products."""
        return self._folded.hidden

    @property
    def loss(self) -> float | None:
        """Mean training loss by examples, over the clients that report one."""
        return self._folded.loss

    @property
    def dead_start(self) -> float | None:
        """Mean of ||grad_A|| / ||grad_B|| on the first batch, over the clients that report both."""
        return self._folded.dead_start

    def mean_factors(self) -> "dict[str, Tensor | None]":
        """Name → mean in float64 of each factor of the layers that were sent; hidden ones left out.

        A factor that a client did not send is the one it started with. None for mixed ranks.
        """
        return self._folded.mean_factors()

    def mean(self) -> "dict[str, Tensor]":
        """Name → mean in float64 of every tensor that was sent, task heads included.

        A tensor of mixed ranks is left out; empty where no client counts.
        """
        return self._folded.means()

    # products

    @property
    def clients(self) -> Sequence[tuple[str, int]]:
        """Name and examples of every client that counts, in order."""
        self._check("clients", "products", "each")
        return self._folded.sites

    def mean_updates(self) -> "Iterator[tuple[str, Factors | Tensor]]":
        """(module, the mean of s_k B_k A_k) in the order of the model, as factors or as a matrix."""
        self._check("mean_updates", "products")
        return self._folded.mean_updates()

    def starts(self) -> "dict[str, list[tuple[Factors, float]]]":
        """Module → what the clients that sent it started from, and the share of each."""
        self._check("starts", "products")
        return self._folded.starts()

    # each

    @property
    def moved(self) -> float | None:
        """``sum_k p_k ||theta_k - theta_start||^2`` over what was sent, task heads left out."""
        self._check("moved", "each")
        return self._folded.moved

    @property
    def spread(self) -> float | None:
        """``sum_k p_k ||theta_k - theta_bar||^2`` over the same; None for mixed ranks."""
        self._check("spread", "each")
        return self._folded.spread

    def _check(self, what: str, *able: Needs) -> None:
        if self._needs not in able:
            named = " or ".join(repr(one) for one in able)
            raise TypeError(
                f"a meter that needs {self._needs!r} is not given {what}: declare needs = {named}"
            )


@dataclass(frozen=True, eq=False)
class Round:
    """A round, as a meter is shown it.

    Attributes:
        before: the state the clients were sent.
        after: what the rule made of the replies.
        replies: as much of them as the meter declares.
        following: what the same clients would be sent next, by name. Filled only where some of them
            start from something else than ``after`` (mixed ranks).
    """

    before: "ServerState"
    after: "ServerState"
    replies: Replies
    following: "Mapping[str, TrainPlan]" = field(default_factory=dict[str, Any])
    _shared: dict[object, Any] = field(default_factory=dict[object, Any], repr=False)

    def once(self, work_out: "Callable[[Round], T]") -> T:
        """What several meters of the same needs read, worked out by the first of them."""
        if work_out not in self._shared:
            self._shared[work_out] = work_out(self)
        return cast(T, self._shared[work_out])


class Meter(ABC):
    """One reading of a round. Made anew for each round.

    Attributes:
        key: its name in ``[evaluation] meters``, and where its reading stands in a round's line.
        needs: what it is given of the replies.
        when: when it is read.
        plots: how it is drawn.
        top: whether the reading stands in the line itself, as those of the first meters do. Later
            ones stand under ``meters``, where no key of the line can be hit.
    """

    key: ClassVar[str]
    needs: ClassVar[Needs] = "sum"
    when: ClassVar[When] = "round"
    plots: ClassVar[tuple[Plot, ...]] = ()
    top: ClassVar[bool] = False

    def add(self, update: "ClientUpdate") -> None:  # noqa: B027 - most meters see no reply
        """See one reply; called where the meter needs ``each``, in the order of the clients' names.

        Only for replies that count: of a client with examples. Keep what you make of it, not it.
        """

    @abstractmethod
    def value(self, round_: Round) -> Mapping[str, Any] | None:
        """The reading: numbers, and mappings and lists of such; None where there is nothing to say.

        A number that a rule does not define is None, never a guess. Change nothing that you are
        shown.
        """


def _are_plots(value: object) -> bool:
    if not isinstance(value, tuple):
        return False
    return all(isinstance(one, Plot) for one in cast("tuple[object, ...]", value))


def check_meter(kind: object, name: str) -> type[Meter]:
    """The class, if it is a meter.

    Args:
        kind: what a name led to.
        name: as the user wrote it, for the error.

    Raises:
        ConfigError: it is none, or declares what there is not.
    """
    if not (isinstance(kind, type) and issubclass(kind, Meter)):
        raise ConfigError(
            f"{name} is not a meter",
            fix="Name a subclass of fedft.core.meters.Meter.",
        )
    key = getattr(kind, "key", None)
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise ConfigError(
            f"the meter {name} has key = {key!r}: a key is made of up to 40 small letters, digits, "
            "dashes and underscores, a letter first",
            fix="Give the class such a key.",
        )
    for attribute, known in (("needs", get_args(Needs)), ("when", get_args(When))):
        if (value := getattr(kind, attribute)) not in known:
            raise ConfigError(
                f"the meter {name} has {attribute} = {value!r}",
                fix=f"Choose one of {', '.join(map(repr, known))}.",
            )
    if not _are_plots(kind.plots):
        raise ConfigError(
            f"the meter {name} has plots that are none",
            fix="Give a tuple of fedft.core.meters.Plot.",
        )
    return kind
