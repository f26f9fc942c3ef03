"""The weighted mean of named tensors, one set at a time; see :mod:`fedft.core.folding`."""

# torch is typed in part; its values are annotated where they enter.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fedft.core.parts import part_of


class Flat:
    """Named tensors end to end, in float64: one operation for all of them instead of one apiece.

    Attributes:
        names: of the tensors, in order.
        shapes: of each.
        values: their entries, [n] float64; a copy.
    """

    def __init__(self, names: Iterable[str], shapes: Iterable[torch.Size], values: Tensor) -> None:
        self.names, self.shapes, self.values = tuple(names), tuple(shapes), values
        self._ends = [0, *accumulate(shape.numel() for shape in self.shapes)]
        self._index = {name: i for i, name in enumerate(self.names)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Flat":
        """The tensors in the order of the mapping."""
        parts = [t.reshape(-1) for t in tensors.values()]
        values = torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)
        return cls(tensors, (t.shape for t in tensors.values()), values)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def shape(self, name: str) -> torch.Size:
        """Of one tensor."""
        return self.shapes[self._index[name]]

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, as a view."""
        i = self._index[name]
        return self.values[self._ends[i] : self._ends[i + 1]].view(self.shapes[i])

    def run(self, like: "Flat") -> Tensor | None:
        """The entries of the tensors of ``like``, as a view.

        None unless they stand here next to each other, in the same order and shapes.
        """
        i = self._index.get(like.names[0]) if like.names else None
        if i is None:
            return None
        end = i + len(like.names)
        fits = self.names[i:end] == like.names and self.shapes[i:end] == like.shapes
        return self.values[self._ends[i] : self._ends[end]] if fits else None

    def take(self, like: "Flat") -> Tensor:
        """The entries of the tensors of ``like``, which are all here, in its order."""
        entries = self.run(like)
        return self.only(like.names).values if entries is None else entries

    def only(self, names: Sequence[str]) -> "Flat":
        """A copy of some of the tensors."""
        return Flat.of({name: self.tensor(name) for name in names})


@dataclass(eq=False)
class _Block:
    """Tensors that came together in every reply so far, and so have one weight."""

    mean: Flat
    weight: float
    factors: bool


class RunningMean:
    """The weighted mean of tensors by name, one reply at a time.

    A tensor that only some replies bring (layer-pruned sites) is averaged over those. One whose
    shape differs among them (mixed ranks) has no mean.

    Attributes:
        mixed: the names of the latter.
        squares: sum_k w_k ||x_k - x_bar||^2 over all but the heads. Kept where the constructor's
            ``spread`` asks for it; means nothing where a tensor is ``mixed``.
    """

    def __init__(self, *, spread: bool = False) -> None:
        self.mixed: set[str] = set()
        self.squares = 0.0
        self._spread = spread
        self._blocks: list[_Block] = []
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> Flat:
        """Fold one reply, of a weight above zero; returns it end to end."""
        reply = Flat.of(tensors)
        self._blocks = [part for block in self._blocks for part in self._parted(block, reply)]
        for block in self._blocks:
            if block.mean.names[0] in reply:
                self._fold(block, reply.take(block.mean), weight)
        new = [name for name in tensors if name not in self._dtypes]
        for factors in (True, False):
            names = [name for name in new if (part_of(name) != "head") is factors]
            if names:
                self._blocks.append(_Block(reply.only(names), weight, factors))
        self._dtypes |= {name: tensors[name].dtype for name in new}
        return reply

    def tensors(self) -> dict[str, Tensor]:
        """Name → mean, in the dtype that was sent first and in the order in which names came.

        Raises:
            ValueError: the sites sent a tensor in different shapes.
        """
        if self.mixed:
            raise ValueError(
                f"{min(self.mixed)} has no mean: its shape is not the same at all clients"
            )
        means = self.means()
        return {n: means[n][0].to(dtype, copy=True) for n, dtype in self._dtypes.items()}

    def means(self) -> dict[str, tuple[Tensor, float]]:
        """Name → its mean, a view in float64, and its weight. What is mixed is missing."""
        return {
            name: (block.mean.tensor(name), block.weight)
            for block in self._blocks
            for name in block.mean.names
        }

    def _parted(self, block: _Block, reply: Flat) -> list[_Block]:
        """The block, or two of which the reply holds one; less the tensors that are mixed now."""
        mean, names = block.mean, block.mean.names
        if reply.run(mean) is not None:
            return [block]
        absent = [n for n in names if n not in reply]
        alike = [n for n in names if n in reply and reply.shape(n) == mean.shape(n)]
        if len(names) in (len(absent), len(alike)):
            return [block]
        self.mixed.update(set(names).difference(absent, alike))
        return [replace(block, mean=mean.only(part)) for part in (absent, alike) if part]

    def _fold(self, block: _Block, x: Tensor, weight: float) -> None:
        before, block.weight = block.weight, block.weight + weight
        if self._spread and block.factors:
            share = before / block.weight
            self.squares += weight * share * squared_distance(x, block.mean.values)
        block.mean.values.lerp_(x, weight / block.weight)


def squared_distance(x: Tensor, y: Tensor) -> float:
    """``||x - y||^2`` of two vectors."""
    difference = x - y
    return float(difference.dot(difference))
