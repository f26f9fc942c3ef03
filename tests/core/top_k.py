"""A compressor that keeps state, as another package might write it: it serves the tests alone."""

import math
from typing import Annotated, Literal

import numpy as np
import torch
from flwr.app import Array
from pydantic import Field
from torch import Tensor

from fedft.core.wire.compress.base import Compressor, Key, finite
from fedft.core.wire.dtypes import Shape


class TopK(Compressor):
    """The largest entries, ceil(share n) of them, as indices and float32, with error feedback."""

    dtype, format = "float32", "test.top-k"
    unbiased = False
    stateful = True

    name: Literal["top-k"] = "top-k"
    share: Annotated[float, Field(gt=0, le=1)] = 0.25

    def count(self, shape: Shape) -> int:
        return math.ceil(self.share * math.prod(shape))

    def size(self, shape: Shape) -> range:
        return range(8 * self.count(shape), 8 * self.count(shape) + 1)

    def encode(self, x: Tensor, key: Key) -> Array:
        flat = finite(x, key).reshape(-1)
        kept = flat.abs().topk(self.count(x.shape)).indices.sort().values
        data = kept.numpy().astype("<u4").tobytes() + flat[kept].numpy().astype("<f4").tobytes()
        return Array(self.dtype, tuple(x.shape), self.format, data)

    def decode(self, array: Array) -> Tensor:
        k, n = self.count(array.shape), math.prod(array.shape)
        if len(array.data) != 8 * k:
            raise ValueError("has another length")
        kept = np.frombuffer(array.data, "<u4", count=k).astype(np.int64)
        if k and (kept.max() >= n or bool((np.diff(kept) <= 0).any())):
            raise ValueError("has indices that are none")
        flat = torch.zeros(n)
        values = np.frombuffer(array.data, "<f4", offset=4 * k).astype(np.float32)
        if not bool(np.isfinite(values).all()):
            raise ValueError("has values that are not finite")
        flat[torch.as_tensor(kept)] = torch.as_tensor(values)
        return flat.reshape(tuple(array.shape))
