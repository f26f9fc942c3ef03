"""What a compressor is: how one tensor becomes bytes and back, and how many bytes that takes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from flwr.app import Array
from torch import Tensor

from fedft.core import seeds
from fedft.core.errors import MismatchError, UpdateRejected
from fedft.core.plugins import reference_of
from fedft.core.spec import Table
from fedft.core.wire.dtypes import Shape


@dataclass(frozen=True)
class Key:
    """What one encoding is for. All randomness of a compressor is drawn from it.

    Attributes:
        seed: run seed.
        round: number of the round.
        site: name of the client that encodes; empty for the server.
        tensor: name of the tensor.
    """

    seed: int = 0
    round: int = 0
    site: str = ""
    tensor: str = ""

    def of(self, tensor: str) -> "Key":
        """The key of one tensor of the same reply, or of one of its records."""
        return replace(self, tensor=f"{self.tensor}/{tensor}" if self.tensor else tensor)

    def generator(self) -> torch.Generator:
        """The same draws for the same key, on every machine and after every restart."""
        return seeds.torch_generator(self.seed, "compress", self.round, self.site, self.tensor)


class Compressor(Table, ABC):
    """One way to send a tensor. Its fields are its settings, the same at both ends of a run.

    What a compressor promises is checked for every row of
    :data:`~fedft.core.wire.compress.COMPRESSORS`: decoding gives back what was encoded within a
    stated bound, the bytes are those of :meth:`size`, the same key gives the same bytes, and where
    it is ``unbiased`` the mean over keys is what was encoded.

    Attributes:
        dtype, format: by which the header of an array says that it was encoded in this way.
        framing: most bytes of an array beyond those of :meth:`size`.
        unbiased: the mean of ``decode(encode(x, key))`` over keys is x.
        exact: ``decode(encode(x, key))`` is x for every float32 x.
        cast: it rounds each number by itself to a shorter type, and travels in both directions.
            All others encode the change of a tensor from where the client started; the server sends
            float32 then. A cast adds no randomness, so that every rule can take it.
        stateful: what an encoding leaves out is added to what is encoded next time (error
            feedback). It is kept at the client, which must therefore come back to make up for it.
    """

    dtype: ClassVar[str]
    format: ClassVar[str]
    framing: ClassVar[int] = 0
    unbiased: ClassVar[bool]
    exact: ClassVar[bool] = False
    cast: ClassVar[bool] = False
    stateful: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name under which a configuration finds it."""
        own = type(self).model_fields.get("name")
        return reference_of(self) if own is None else str(own.default)

    @abstractmethod
    def encode(self, x: Tensor, key: Key) -> Array:
        """One tensor for the wire.

        Args:
            x: float32 or float64, of any shape, also without elements.
            key: of this encoding.

        Raises:
            MismatchError: x holds NaN or Inf, where the encoding cannot say that.
        """

    @abstractmethod
    def decode(self, array: Array) -> Tensor:
        """The tensor that was encoded, float32, in its shape.

        Called after :meth:`admit` has compared header and length with what can come; the shape is
        that of the schema. The bytes may still be anything.

        Raises:
            ValueError: they are none that :meth:`encode` makes.
        """

    @abstractmethod
    def size(self, shape: Shape) -> range:
        """How many bytes the encoding of a tensor of this shape can take, header not counted."""

    def most(self, shape: Shape) -> int:
        """The most bytes that a tensor of this shape takes: what forecasts count."""
        return self.size(shape)[-1]

    def admit(self, name: str, dtype: str, format: str, shape: Shape, size: int) -> None:
        """Compare what a header says of an encoding with what can come, before it is taken.

        Args:
            name: of the tensor, for the error.
            dtype: as the header says.
            format: as the header says.
            shape: as the schema says, and the header.
            size: in bytes, header and all.

        Raises:
            UpdateRejected: ``dtype``, ``format`` or ``size``.
        """
        if format != self.format:
            said = f"{name} is not in the format of {self.label!r}, which this run is sent in"
            raise UpdateRejected("format", said)
        if dtype != self.dtype:
            raise UpdateRejected("dtype", f"{name} is {dtype[:20]!r}, not {self.dtype!r}")
        check_length(name, size, self.size(shape), self.framing)


def check_length(name: str, size: int, sizes: range, framing: int) -> None:
    """Refuse a length that no encoding of a tensor has.

    Raises:
        UpdateRejected: ``size``.
    """
    if size not in range(sizes[0], sizes[-1] + framing + 1):
        fits = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        raise UpdateRejected("size", f"{name} has {size} bytes for {fits}")


def finite(x: Tensor, key: Key) -> Tensor:
    """The tensor, on the CPU and out of its graph.

    Raises:
        MismatchError: it holds NaN or Inf, or a number beyond float32.
    """
    x = x.detach().cpu()
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not largest <= torch.finfo(torch.float32).max:
        raise MismatchError(
            f"{key.site or 'the server'} cannot send {key.tensor}: it contains NaN, Inf or a number "
            "beyond float32",
            fix="Lower [training] lr: the training of this client diverged.",
        )
    return x
