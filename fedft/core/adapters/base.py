"""What a family of adapters is: its tensors, where they start, and its files.

One family is one file here, with its engine in ``fedft/clients/engines`` and a row in the table of
each. A family whose tensors are not LoRA's factors carries them whole, by PEFT name, in
:attr:`fedft.core.types.Adapter.head`; the parts they are of have their row in
:data:`fedft.core.types.PARTS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from fedft.core.checkpoint import Head
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Delta

Shapes = Mapping[str, tuple[int, ...]]
"""PEFT name → shape of a tensor."""

Modules = Mapping[str, tuple[int, int]]
"""Path of each adapted layer → (d_out, d_in)."""


@dataclass(frozen=True, eq=False)
class Export:
    """What the files of an adapter are made from.

    Attributes:
        adapter, delta: the state.
        model: the `[model]` table.
        lora: the `[lora]` table.
        head: which modules the adapter's task head consists of.
        beside: name → frozen tensor that peft takes for the head's, see
            :attr:`~fedft.core.checkpoint.Head.beside`.
        classes: number of classes.
        seed: run seed.
        transposed: whether adapted layers hold their weights as [d_in, d_out].
        frozen: what the method needs and does not train, and the paths of the adapted layers; loads
            the base, so it is called by those that have any.
    """

    adapter: Adapter
    delta: Delta
    model: ModelSpec
    lora: LoraSpec
    head: Head
    beside: Mapping[str, Tensor]
    classes: int
    seed: int
    transposed: bool
    frozen: Callable[[], tuple[Mapping[str, Tensor], list[str]]]


class Family(ABC):
    """Base of every family. What it does not say is that of tensors carried whole.

    Attributes:
        name: of the family; `[lora] method` where it is no method of peft.
        stock: whether what stock PEFT loads of an export is the run's own model.
        bounded: whether a rank is at most the smaller side of every adapted layer.
        note: a line of Markdown for the card of an export; empty where there is nothing to say.
    """

    name: ClassVar[str]
    stock: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    note: ClassVar[str] = ""

    @abstractmethod
    def check(self, lora: LoraSpec) -> None:
        """Refuse a `[lora]` table that says what this family cannot be.

        Raises:
            ConfigError: naming the key.
        """

    def draws(self, lora: LoraSpec) -> bool:
        """Whether the start is drawn by peft on the loaded base, and not from the seed alone."""
        return False

    def from_weights(self, lora: LoraSpec) -> bool:
        """Whether frozen tensors are worked out from the base weights, which a low precision changes."""
        return False

    @abstractmethod
    def shapes(self, model: nn.Module, lora: LoraSpec, modules: Modules) -> Shapes:
        """The tensors that are carried whole; empty where ``modules`` and a rank say it all.

        Args:
            model: without weights.
            lora: the `[lora]` table.
            modules: the adapted layers.
        """

    @abstractmethod
    def initial(self, shapes: Shapes, seed: int) -> dict[str, Tensor]:
        """What the tensors of :meth:`shapes` start from, a function of the run seed.

        Of a family that :meth:`draws` these are zeros of the right shape.
        """

    @abstractmethod
    def save(self, folder: Path, export: Export) -> None:
        """Write an adapter that stock PEFT loads, and what else the family needs.

        Args:
            folder: created if needed.
            export: what to write.

        Raises:
            EnvironmentFailure: the disk refused.
        """
