"""The replies of one round, folded one by one, as far as somebody asks for what comes of them."""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from fedft.core.folding.products import MeanUpdate
from fedft.core.means import Flat, RunningMean, squared_distance
from fedft.core.parts import MATRICES
from fedft.core.types import Adapter, ClientUpdate, Factors, Part, factor_name, module_of, part_of


@dataclass(frozen=True, eq=False)
class _Frame:
    """What consecutive replies of one start and one set of names have in common.

    Attributes:
        start: the adapter these sites trained from.
        names: what they sent.
        sent: of ``start``, the tensors that were sent, without the heads.
        kept: of ``start``, the factors that were not sent, of layers that were; without those that
            nobody knows.
        layers: (module, names of its A, B and R) of layers that were sent.
        origin: the examples of all such replies of the round are counted here.
    """

    start: Adapter
    names: tuple[str, ...]
    sent: Flat
    kept: Mapping[str, Tensor]
    layers: Sequence[tuple[str, tuple[str, str, str]]]
    origin: "_Start"

    @classmethod
    def of(
        cls,
        update: ClientUpdate,
        hidden: frozenset[Part],
        starts: dict[tuple[int, tuple[str, ...]], "_Start"],
    ) -> "_Frame":
        sent = {module_of(name) for name in update.tensors if part_of(name) != "head"}
        held = [module for module in update.start.factors if module in sent]
        layers = [
            (m, (factor_name(m, "A"), factor_name(m, "B"), factor_name(m, "R"))) for m in held
        ]
        start, known = update.start.tensors(), update.start.tensors(MATRICES - hidden)
        factors = {name for _, names in layers for name in names}
        key = id(update.start), tuple(update.tensors)
        return cls(
            start=update.start,
            names=tuple(update.tensors),
            sent=Flat.of({n: start[n] for n in update.tensors if part_of(n) != "head"}),
            kept={n: t for n, t in known.items() if n in factors and n not in update.tensors},
            layers=layers,
            origin=starts.setdefault(key, _Start(update.start, held)),
        )


@dataclass(eq=False)
class _Start:
    """What sites trained from that sent the same tensors, and how many examples they have."""

    adapter: Adapter
    modules: Sequence[str]
    weight: int = 0


class _Average:
    """A weighted mean of numbers; None of none."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float) -> None:
        self._sum += weight * value
        self._weight += weight

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None


class Folded:
    """The replies of one round, folded one by one.

    Args:
        personal: the parts that stay at the sites (``strategy.personal``).
        products: whether the mean of the products B_k A_k is asked for; without, :meth:`mean_updates`
            and :meth:`starts` are empty.
        squares: whether the sums of squares are; without, :attr:`moved` and :attr:`spread` are None.

    Attributes:
        hidden: the factors that stay at the sites (FedSA-LoRA keeps B). The server never learns the
            products B_k A_k then, and keeps no mean update.
        sites: name and examples of every site that counts, in order.
        examples: of all of them.
    """

    def __init__(
        self, personal: Iterable[Part] = (), *, products: bool = True, squares: bool = True
    ) -> None:
        self.hidden = frozenset(personal) & MATRICES
        self._products, self._squares = products and not self.hidden, squares
        self.sites: list[tuple[str, int]] = []
        self.examples = 0
        self._sent, self._kept = RunningMean(spread=squares), RunningMean()
        self._updates: dict[str, MeanUpdate] = {}
        self._frame: _Frame | None = None
        self._starts: dict[tuple[int, tuple[str, ...]], _Start] = {}
        self._factors_sent, self._moved = False, 0.0
        self._loss, self._dead_start = _Average(), _Average()
        self._records: dict[str, RunningMean] = {}

    def add(self, update: ClientUpdate) -> None:
        """Fold one reply. That of a site without examples counts for nothing."""
        n = update.examples
        if n <= 0:
            return
        self.sites.append((update.site, n))
        self.examples += n
        frame = self._framed(update)
        frame.origin.weight += n
        reply = self._sent.add(update.tensors, n)
        if self._squares:
            self._moved += n * squared_distance(reply.take(frame.sent), frame.sent.values)
        if frame.kept:
            self._kept.add(frame.kept, n)
        if self._products:
            self._add_products(frame, update, n)
        for name, record in update.records.items():
            self._records.setdefault(name, RunningMean()).add(record, n)
        self._add_metrics(update.metrics, n)

    # What the rules and the record need.

    @property
    def loss(self) -> float | None:
        """Mean training loss by examples, over the sites that report one."""
        return self._loss.value

    def mean_update(self, start: Adapter) -> ClientUpdate:
        """The one reply that a rule with ``uses_mean_only`` is handed in place of all of them.

        Records beside the adapter are averaged as its tensors are, each over those who sent it.

        Args:
            start: what the sites trained from, at the rank of the server.

        Raises:
            ValueError: no site counts, or the ranks are mixed.
        """
        if not self.sites:
            raise ValueError("no reply has been folded, so there is no mean of them")
        records = {name: mean.tensors() for name, mean in self._records.items()}
        return ClientUpdate("mean", self.examples, self._sent.tensors(), start, records=records)

    # What the meters need.

    def mean_updates(self) -> Iterator[tuple[str, Factors | Tensor]]:
        """(module, its dW) in the order of the model; see :meth:`MeanUpdate.value`."""
        for module, update in self._updates.items():
            if update.weight:
                yield module, update.value()

    def starts(self) -> dict[str, list[tuple[Factors, float]]]:
        """Module → what the sites that sent it trained from, and the share of each in its mean.

        Sites of one start count as one. Empty where a factor stays at the sites.
        """
        found: dict[str, list[tuple[Factors, float]]] = {}
        for start in self._starts.values():
            for module in start.modules:
                if whole := self._updates[module].weight:
                    share = start.weight / whole
                    found.setdefault(module, []).append((start.adapter.factors[module], share))
        return found

    def means(self) -> dict[str, Tensor]:
        """Name → mean in float64 of every tensor that was sent; those of mixed shapes left out."""
        return {name: mean.clone() for name, (mean, _) in self._sent.means().items()}

    def mean_factors(self) -> dict[str, Tensor | None]:
        """Name → mean in float64 of each factor of the layers that were sent; hidden ones left out.

        A factor that a site did not send is the one it started with. None for mixed ranks.
        """
        sent, kept = self._sent.means(), self._kept.means()
        mixed = self._sent.mixed | self._kept.mixed
        names = [factor_name(module, part) for module in self._updates for part in ("A", "R", "B")]
        return {
            name: None if name in mixed else _pooled(sent.get(name), kept.get(name))
            for name in names
            if name in sent or name in kept or name in mixed
        }

    @property
    def moved(self) -> float | None:
        """``sum_k p_k ||theta_k - theta_start||^2`` over what was sent, heads left out."""
        return self._moved / self.examples if self._factors_sent and self._squares else None

    @property
    def spread(self) -> float | None:
        """``sum_k p_k ||theta_k - theta_bar||^2`` over the same; None for mixed ranks."""
        comparable = self._factors_sent and self._squares and not self._sent.mixed
        return self._sent.squares / self.examples if comparable else None

    @property
    def dead_start(self) -> float | None:
        """Mean of ||grad_A|| / ||grad_B|| by examples.

        Over the sites that report both and have a gradient in B; None without any.
        """
        return self._dead_start.value

    # One reply.

    def _framed(self, update: ClientUpdate) -> _Frame:
        """What the reply shares with the one before, or its own."""
        old = self._frame
        if old is not None and old.start is update.start and old.names == tuple(update.tensors):
            return old
        self._frame = frame = _Frame.of(update, self.hidden, self._starts)
        for module in update.start.factors:
            self._updates.setdefault(module, MeanUpdate())
        self._factors_sent = self._factors_sent or bool(frame.sent.names)
        return frame

    def _add_products(self, frame: _Frame, update: ClientUpdate, n: int) -> None:
        sent = update.tensors
        for module, (name_A, name_B, name_R) in frame.layers:
            x = frame.start.factors[module]
            R = None if x.R is None else sent.get(name_R, x.R)
            x = Factors(sent.get(name_A, x.A), sent.get(name_B, x.B), x.scale, R)
            self._updates[module].add(x, n)

    def _add_metrics(self, metrics: Mapping[str, float], n: int) -> None:
        if "loss" in metrics:
            self._loss.add(metrics["loss"], n)
        if metrics.keys() >= {"grad_A_norm", "grad_B_norm"} and metrics["grad_B_norm"] > 0:
            ratio = metrics["grad_A_norm"] / metrics["grad_B_norm"]
            if isfinite(ratio):
                self._dead_start.add(ratio, n)


def _pooled(x: tuple[Tensor, float] | None, y: tuple[Tensor, float] | None) -> Tensor | None:
    """The mean of two groups from their means and weights; None where their shapes differ."""
    if x is None or y is None:
        known = x or y
        return None if known is None else known[0]
    if x[0].shape != y[0].shape:
        return None
    return x[0].lerp(y[0], y[1] / (x[1] + y[1]))


def fold(updates: Iterable[ClientUpdate], personal: Iterable[Part] = ()) -> Folded:
    """All replies of a round, in the order of the sites' names.

    Args:
        updates: in any order.
        personal: the parts that stay at the sites (``strategy.personal``).
    """
    folded = Folded(personal)
    for update in sorted(updates, key=lambda u: u.site):
        folded.add(update)
    return folded
