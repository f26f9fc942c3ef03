"""Is this reply what the plan asked for? Decided before a number of it is used.

Nothing here knows how a reply arrived. The order of the checks is the order of their cost: names,
types and shapes are compared with what the plan implies before any byte is decoded, so that a
header that claims terabytes costs nothing; then the numbers are decoded and looked at.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedft.core.errors import UpdateRejected
from fedft.core.types import ClientUpdate, Site, TrainPlan
from fedft.core.wire import codec

_FLOATS = {"float32": 4, "float16": 2, "float64": 8, "bfloat16": 2}
_HEADER = 4096
"""Bytes of framing that an encoded array may have beyond its numbers."""

REPLY_REFUSED = 110
"""Code of an error reply for a result that a grid refused by its header, before any of its bytes
came; the reason starts with the word that :class:`~fedft.core.errors.UpdateRejected` gives it."""

PLAN_FAILED = 111
"""Code for a client for which no plan could be made, or not be put into a message."""

CHECK_FAILED = 112
"""Code for a client whose reply could not be checked."""


SERVERS = frozenset({REPLY_REFUSED, PLAN_FAILED, CHECK_FAILED})
"""Codes that a server gives; no client may."""


@dataclass(frozen=True)
class Limits:
    """What a reply may not exceed.

    Attributes:
        update_norm: norm of the change from the start over all tensors; None accepts any.
        metric: magnitude of a reported number.
    """

    update_norm: float | None = None
    metric: float = 1e12


def validate(content: RecordDict, plan: TrainPlan, site: Site, limits: Limits) -> ClientUpdate:
    """Check a reply and decode it.

    Args:
        content: the reply.
        plan: what the site was asked; the names and shapes of ``plan.sent()`` are the schema.
        site: as enrolled; it cannot claim more examples than that.
        limits: further bounds.

    Raises:
        UpdateRejected: with a one-word reason: ``schema``, ``keys``, ``dtype``, ``shape``, ``size``,
            ``format``, ``examples``, ``metrics``, ``nan``, ``norm``.
    """
    arrays = _record(content)
    expected = plan.sent()
    _check_schema(arrays, expected, site.name)
    metrics = _metrics(content, site)
    tensors = {name: _decode(name, arrays[name], site.name) for name in expected}
    _check_numbers(tensors, expected, limits, site.name)
    return ClientUpdate(
        site=site.name,
        examples=int(metrics.pop("num-examples")),
        tensors=tensors,
        start=plan.start,
        metrics=metrics,
    )


def comparison(content: RecordDict, blocks: int) -> tuple[Tensor, Tensor, int] | None:
    """What a site says of the model's blocks: similarities, importances, rows; None if unusable."""
    arrays = content.array_records.get("arrays", ArrayRecord())
    metrics: Any = content.metric_records.get("metrics", {})
    sizes = {"similarity": blocks * (blocks - 1) // 2, "importance": blocks}
    rows = metrics.get("num-examples")
    if set(arrays) != set(sizes) or not isinstance(rows, int) or rows < 1:
        return None
    try:
        _check_schema(arrays, {n: torch.empty(size) for n, size in sizes.items()}, "a site")
        similarity, importance = (_decode(name, arrays[name], "a site") for name in sizes)
    except UpdateRejected:
        return None
    alike = bool(((similarity >= 0) & (similarity <= 1)).all())
    return (similarity, importance, rows) if alike and bool(importance.isfinite().all()) else None


def _record(content: RecordDict) -> ArrayRecord:
    if set(content.array_records) != {"arrays"}:
        raise UpdateRejected("schema", "a reply has exactly one array record, 'arrays'")
    return content.array_records["arrays"]


def _check_schema(arrays: ArrayRecord, expected: dict[str, Tensor], site: str) -> None:
    if set(arrays) != set(expected):
        extra, missing = set(arrays) - set(expected), set(expected) - set(arrays)
        raise UpdateRejected(
            "keys", f"{site}: {len(missing)} tensors missing, {len(extra)} not asked for"
        )
    for name, tensor in expected.items():
        array = arrays[name]
        if array.dtype not in _FLOATS:
            raise UpdateRejected("dtype", f"{site}: {name} is {array.dtype[:20]!r}, not a float")
        if tuple(array.shape) != tuple(tensor.shape):
            raise UpdateRejected(
                "shape", f"{site}: {name} is {tuple(array.shape)}, not {tuple(tensor.shape)}"
            )
        _check_size(name, array, tensor.numel(), site)


def _check_size(name: str, array: Array, elements: int, site: str) -> None:
    numbers = elements * _FLOATS[array.dtype]
    slack = 0 if array.stype == codec.BF16 else _HEADER
    if not numbers <= len(array.data) <= numbers + slack:
        raise UpdateRejected("size", f"{site}: {name} has {len(array.data)} bytes for {numbers}")
    known = array.stype == codec.BF16 or (
        array.stype == codec.NPY and array.data.startswith(codec.NPY_MAGIC)
    )
    if not known:
        raise UpdateRejected("format", f"{site}: {name} is in no known serialisation format")


def _decode(name: str, array: Array, site: str) -> Tensor:
    try:
        tensor = codec.tensor_from(array)
    except Exception as error:  # any failure to decode hostile bytes is the same refusal
        raise UpdateRejected("format", f"{site}: {name} cannot be decoded: {error}") from error
    if tuple(tensor.shape) != tuple(array.shape) or not tensor.is_floating_point():
        raise UpdateRejected("format", f"{site}: {name} does not contain what it declares")
    return tensor.float()


def _metrics(content: RecordDict, site: Site) -> dict[str, float]:
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise UpdateRejected("schema", f"{site.name}: a reply has exactly one metric record")
    metrics = cast(dict[str, Any], dict(records[0]))
    examples = metrics.get("num-examples")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise UpdateRejected("examples", f"{site.name}: {examples!r} is no number of examples")
    if examples > site.examples:
        raise UpdateRejected(
            "examples", f"{site.name}: claims {examples} examples, enrolled with {site.examples}"
        )
    for name, value in metrics.items():
        if isinstance(value, list) or not math.isfinite(value):
            raise UpdateRejected("metrics", f"{site.name}: metric {name!r} is not a finite number")
    return {name: float(value) for name, value in metrics.items()}


def _check_numbers(
    tensors: dict[str, Tensor], start: dict[str, Tensor], limits: Limits, site: str
) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateRejected("nan", f"{site}: {name} contains NaN or Inf")
    if limits.update_norm is None:
        return
    change = math.sqrt(
        sum(float((t - start[n]).double().square().sum()) for n, t in tensors.items())
    )
    if change > limits.update_norm:
        raise UpdateRejected("norm", f"{site}: moved by {change:.3g} > {limits.update_norm:.3g}")
