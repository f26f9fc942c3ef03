"""Casts: each number by itself in float32 or bfloat16.

    fp32    4 bytes a number, exact
    bf16    2 bytes a number, rounded to the nearest of 8 significant bits: |x - decode| <= 2^-8 |x|

A receiver of casts takes any type of float in either format, whichever of the two the run names:
a client that sends float32 in a run of bfloat16 is understood.
"""

from abc import ABC
from typing import Literal

import torch
from flwr.app import Array
from torch import Tensor

from fedft.core.errors import UpdateRejected
from fedft.core.wire.compress.base import Compressor, Key, check_length
from fedft.core.wire.dtypes import (
    BF16,
    FLOATS,
    FRAMING,
    NPY,
    NPY_MAGIC,
    Shape,
    plain,
    plain_bytes,
)


class Cast(Compressor, ABC):
    """What the two casts share: NaN and Inf travel as they are, and are refused by who takes them."""

    cast = True

    def size(self, shape: Shape) -> range:
        numbers = plain_bytes(self.dtype, shape)
        return range(numbers, numbers + 1)

    def admit(self, name: str, dtype: str, format: str, shape: Shape, size: int) -> None:
        if dtype not in FLOATS:
            raise UpdateRejected("dtype", f"{name} is {dtype[:20]!r}, not a float")
        numbers = plain_bytes(dtype, shape)
        check_length(name, size, range(numbers, numbers + 1), FRAMING.get(format, FRAMING[NPY]))
        if format not in FRAMING:
            raise UpdateRejected("format", f"{name} is in no known serialisation format")

    def decode(self, array: Array) -> Tensor:
        if array.stype == NPY and not array.data.startswith(NPY_MAGIC):
            raise ValueError("is in no known serialisation format")
        tensor = plain(array)
        if tuple(tensor.shape) != tuple(array.shape) or not tensor.is_floating_point():
            raise ValueError("does not contain what it declares")
        return tensor.float()


class Fp32(Cast):
    """float32, in Flower's NumPy format."""

    dtype, format, framing = "float32", NPY, FRAMING[NPY]
    unbiased, exact = True, True

    name: Literal["fp32"] = "fp32"

    def encode(self, x: Tensor, key: Key) -> Array:
        return Array(x.detach().cpu().contiguous().float().numpy())


class Bf16(Cast):
    """bfloat16, rounded to nearest: a bias of up to 2^-9 of each number."""

    dtype, format, framing = "bfloat16", BF16, FRAMING[BF16]
    unbiased = False

    name: Literal["bf16"] = "bf16"

    def encode(self, x: Tensor, key: Key) -> Array:
        x = x.detach().cpu().contiguous()
        raw = x.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False)
        return Array(self.dtype, tuple(x.shape), self.format, raw.tobytes())
