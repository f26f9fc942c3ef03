"""Eight bits a number: blockwise scales and stochastic rounding.

    Alistarh, Grubic, Li, Tomioka and Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
    Quantization and Encoding", NeurIPS 2017: stochastic rounding, unbiased.
    Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR
    2022: one scale a block, so that one large number costs its own block alone.

    s_b = max |x_i| / 127 over the block b        c_i = floor(x_i / s_b + u_i),  u_i ~ U[0, 1)
    decode: s_b c_i                                |s_b c_i - x_i| < s_b,  E[s_b c_i] = x_i

Departures: QSGD scales by the norm of the whole vector and codes the integers with Elias coding;
here the scale is the largest magnitude of a block, as in the second paper, and a code is a byte.

Wire: the codes, one byte each, in C order, then the scales as float32, little-endian: n + 4 ceil(n /
block) bytes, 0.254 of float32's at blocks of 256. It encodes the change from where the client
started; the server sends float32, which is what the change is relative to.
"""

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedft.core.wire.compress.base import Compressor, Key, finite
from fedft.core.wire.dtypes import Shape

LEVELS = 127
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_SCALE = np.nextafter(np.float32(_LARGEST / LEVELS), np.float32(np.inf))


class Int8(Compressor):
    """Changes in eight bits a number, unbiased.

    Attributes:
        block: numbers that share a scale.
    """

    dtype, format = "int8", "fedft.int8"
    unbiased = True

    name: Literal["int8"] = "int8"
    block: Annotated[int, Field(ge=16, le=65_536)] = 256

    def size(self, shape: Shape) -> range:
        n = math.prod(shape)
        size = n + 4 * -(-n // self.block)
        return range(size, size + 1)

    def encode(self, x: Tensor, key: Key) -> Array:
        flat = finite(x, key).reshape(-1).double()
        blocks = self._blocks(flat.numpy())  # [blocks, block], the last one filled up with zeros
        scales = _scales(np.abs(blocks).max(axis=1, initial=0.0))
        noise = torch.rand(len(flat), generator=key.generator(), dtype=torch.float64).numpy()
        steps = blocks / np.maximum(scales, _SMALLEST)[:, None]
        drawn = np.floor(steps.reshape(-1)[: len(flat)] + noise)
        codes = np.minimum(drawn, LEVELS).astype(np.int8)  # 127 + u can round to 128
        data = codes.tobytes() + scales.astype("<f4").tobytes()
        return Array(self.dtype, tuple(x.shape), self.format, data)

    def decode(self, array: Array) -> Tensor:
        n = math.prod(array.shape)
        if len(array.data) not in self.size(array.shape):
            raise ValueError(f"has {len(array.data)} bytes for {self.most(array.shape)}")
        codes = np.frombuffer(array.data, np.int8, count=n)
        scales = np.frombuffer(array.data, "<f4", offset=n)
        if not bool(((scales >= 0) & (scales <= _LARGEST_SCALE)).all()):
            raise ValueError("has a scale that no finite numbers have")
        if n and int(codes.min()) < -LEVELS:
            raise ValueError(f"has codes beyond ±{LEVELS}")
        whole = self._blocks(codes) * scales.astype(np.float64)[:, None]
        rounded = whole.clip(-_LARGEST, _LARGEST).astype(np.float32).reshape(-1)[:n]
        return torch.as_tensor(rounded).reshape(tuple(array.shape))

    def _blocks(self, flat: NDArray[Any]) -> NDArray[Any]:
        missing = -len(flat) % self.block
        return np.pad(flat, (0, missing)).reshape(-1, self.block)


def _scales(largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """``largest / 127`` in float32, rounded up so that no step is beyond 127."""
    scales = (largest / LEVELS).astype(np.float32)
    low = scales.astype(np.float64) * LEVELS < largest
    scales[low] = np.nextafter(scales[low], np.float32(np.inf))
    return scales.astype(np.float64)
