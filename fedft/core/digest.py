"""Fingerprints of what a run produced: equal digests mean equal tensors, bit for bit.

A digest covers names, shapes, dtypes, scales and bytes. Mappings go in by sorted name, so that it
does not depend on the order in which a dictionary was filled; every field is preceded by its
length, so that no two states read as the same stream of bytes.
"""

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor, uint8

from fedft.core.types import Adapter, Delta, Factors, ServerState, clone


def adapter_digest(adapter: Adapter, delta: Delta | None = None) -> str:
    """SHA-256 of the global model: the adapter, and the change of the base weights under it.

    This is ``adapter_sha256`` of ``summary.json``. The digest is of the values in memory, not of
    an exported file, whose header may change with the version of a library.
    """
    return _sha256(_adapter(adapter, {} if delta is None else delta))


def state_digest(state: ServerState) -> str:
    """SHA-256 of everything but the round's number: adapter, delta and slots.

    A round that changed nothing therefore keeps its digest.
    """

    def fields() -> Iterable[bytes]:
        yield from _adapter(state.adapter, state.delta)
        yield from _tensors(b"slots", state.slots)

    return _sha256(fields())


def _sha256(fields: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for field in fields:
        digest.update(len(field).to_bytes(8, "big"))
        digest.update(field)
    return digest.hexdigest()


def _adapter(adapter: Adapter, delta: Delta) -> Iterable[bytes]:
    yield from _factors(b"adapter", adapter.factors)
    yield from _tensors(b"head", adapter.head)
    yield from _factors(b"delta", delta)


def _factors(section: bytes, factors: Mapping[str, Factors]) -> Iterable[bytes]:
    yield from _opening(section, len(factors))
    for module, f in sorted(factors.items()):
        yield module.encode()
        yield float(f.scale).hex().encode()
        yield from _tensors(b"", {"A": f.A, "B": f.B} | ({} if f.R is None else {"R": f.R}))


def _tensors(section: bytes, tensors: Mapping[str, Tensor]) -> Iterable[bytes]:
    yield from _opening(section, len(tensors))
    for name, tensor in sorted(tensors.items()):
        yield name.encode()
        yield f"{tensor.dtype} {list(tensor.shape)}".encode()
        yield clone(tensor).reshape(-1).view(uint8).numpy().tobytes()


def _opening(section: bytes, count: int) -> Iterable[bytes]:
    yield section
    yield count.to_bytes(8, "big")
