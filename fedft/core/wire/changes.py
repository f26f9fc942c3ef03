"""The tensors of one reply, as a compressor sends them.

A cast sends the tensors themselves. Every other compressor sends how a tensor changed from where the
client started, which both ends know; of a tensor that has no start it sends the tensor. With what a
stateful compressor left out of its last encoding, e, at the same client:

    u = theta - theta_start + e        sent: C(u)        e <- u - C(u)        server: theta_start + C(u)

so that over the rounds in which a client takes part the sum of what was sent is the sum of its
changes, less the last e.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedft.core.terms import entries, taken
from fedft.core.wire.compress import FP32, Compressor, Key

LEFT = "left-out"
"""The record of a client's own state that says what its last encoding left out of each tensor."""


@dataclass(frozen=True, eq=False)
class Packing:
    """How the tensors of one reply are sent.

    Attributes:
        compressor: of the run.
        key: of the reply; each tensor's own is made of it.
        start: name → tensor where the client started, as it read it.
        left: name → what was left out last time; of a stateful compressor only.
    """

    compressor: Compressor = FP32
    key: Key = field(default_factory=Key)
    start: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    left: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def pack(self, tensors: Mapping[str, Tensor]) -> tuple[ArrayRecord, dict[str, Tensor]]:
        """Encode, and say what was left out: empty where the compressor keeps no state.

        Raises:
            MismatchError: a tensor holds NaN or Inf, and the compressor cannot send that.
        """
        arrays: dict[str, Array] = {}
        left: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            key = self.key.of(name)
            if not tensor.is_floating_point():
                arrays[name] = Array(tensor.detach().cpu().contiguous().numpy())
                continue
            if self.compressor.cast:
                arrays[name] = self.compressor.encode(tensor, key)
                continue
            change = self._change(name, tensor)
            arrays[name] = self.compressor.encode(change, key)
            if self.compressor.stateful:
                left[name] = change - self.compressor.decode(arrays[name])
        return ArrayRecord(arrays), left

    def beside(
        self, record: str, tensors: Mapping[str, Tensor]
    ) -> tuple[ArrayRecord, dict[str, Tensor]]:
        """:meth:`pack` for a record beside the adapter, whose tensors have no start.

        What is left out of it stands under names of its own, as tensors of two records may have the
        same name.
        """
        own = replace(
            self,
            key=self.key.of(record),
            start={},
            left=taken(record, self.left),
        )
        arrays, left = own.pack(tensors)
        return arrays, entries(record, left)

    def _change(self, name: str, tensor: Tensor) -> Tensor:
        change = tensor.detach().cpu().float()
        if (start := self.start.get(name)) is not None:
            change = change - start.detach().cpu().float()
        left = self.left.get(name)
        # A client whose rank has changed has nothing left over in the new shape.
        return change if left is None or left.shape != change.shape else change + left


def unpacked(array: Array, compressor: Compressor, start: Tensor | None) -> Tensor:
    """One tensor of a reply, float32: the inverse of :meth:`Packing.pack`.

    Raises:
        ValueError: the bytes are none that the compressor makes.
    """
    decoded = compressor.decode(array)
    return decoded if compressor.cast or start is None else start.float() + decoded
