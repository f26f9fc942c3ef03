"""The number types that travel, and the two formats of plain numbers: the only place that lists them.

float32 travels in Flower's NumPy format; bfloat16, which NumPy does not know, travels as raw
little-endian bytes under a serialisation type of our own.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any, Final, Literal

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

ITEM_BYTES: Final[Mapping[str, int]] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
}
"""Name of a number type → bytes of one number."""

FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})

NPY: Final = "numpy.ndarray"
"""Serialisation type of Flower's NumPy format."""

BF16: Final = "fedft.bfloat16"
"""Serialisation type of a bfloat16 array: its raw bytes, little-endian, C order."""

FRAMING: Final[Mapping[str, int]] = {NPY: 4096, BF16: 0}
"""Serialisation type → most bytes that an array may have beyond its numbers."""

NPY_MAGIC: Final = b"\x93NUMPY"
_LONGEST_HEADER = 512
"""Longest header of a NumPy array that is remembered; an honest one has 128 bytes."""

Shape = Sequence[int]


def plain_bytes(dtype: str, shape: Shape) -> int:
    """Bytes of the numbers of a plain array, without its header."""
    return math.prod(shape) * ITEM_BYTES.get(dtype, 8)


def plain(array: Array) -> Tensor:
    """Decode an array of plain numbers. bfloat16 comes back as float32.

    Raises:
        ValueError: the bytes are not what they say they are.
    """
    try:
        return _plain(array)
    except ValueError:
        raise
    except Exception as error:  # NumPy reads a header as Python, and raises what a parser does
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from error


def _plain(array: Array) -> Tensor:
    if array.stype == BF16:
        raw = np.frombuffer(array.data, dtype="<i2").astype(np.int16)
        return torch.as_tensor(raw).view(torch.bfloat16).float().reshape(array.shape)
    start = 10 + int.from_bytes(array.data[8:10], "little")
    known = array.stype == NPY and array.data.startswith(NPY_MAGIC + b"\x01\x00")
    if not known or start > _LONGEST_HEADER:
        return torch.as_tensor(array.numpy())
    shape, order, dtype = _npy_header(array.data[8:start])
    numbers = np.frombuffer(array.data, dtype, count=math.prod(shape), offset=start)
    return torch.as_tensor(numbers.reshape(shape, order=order).copy())


@lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[Any]]:
    """Shape, order and dtype of a NumPy array; a round has thousands, and few different ones."""
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(header))
    return shape, "F" if fortran else "C", dtype
