"""Is this reply what the plan asked for? Decided before a number of it is used.

Nothing here knows how a reply arrived. The order of the checks is the order of their cost: names,
types and shapes are compared with what the plan implies before any byte is decoded, so that a
header that claims terabytes costs nothing; then the numbers are decoded and looked at.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedft.core.errors import UpdateRejected
from fedft.core.terms import Shapes
from fedft.core.types import ClientUpdate, Site, TrainPlan
from fedft.core.wire.changes import unpacked
from fedft.core.wire.compress import FP32, Compressor
from fedft.core.wire.schema import ARRAYS, PlanSchema

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
        update_norm: norm of the change from the start over all tensors, and of each record beside
            the adapter on its own; None accepts any.
        metric: magnitude of a reported number.
    """

    update_norm: float | None = None
    metric: float = 1e12


def validate(
    content: RecordDict,
    plan: TrainPlan,
    site: Site,
    limits: Limits,
    compressor: Compressor = FP32,
) -> ClientUpdate:
    """Check a reply and decode it.

    Args:
        content: the reply.
        plan: what the site was asked; :class:`~fedft.core.wire.schema.PlanSchema` of it is what the
            reply must consist of, record by record.
        site: as enrolled; it cannot claim more examples than that.
        limits: further bounds.
        compressor: in which replies of the run are sent; nothing else is decoded.

    Raises:
        UpdateRejected: with a one-word reason: ``schema``, ``keys``, ``dtype``, ``shape``, ``size``,
            ``format``, ``examples``, ``metrics``, ``nan``, ``norm``.
    """
    expected = PlanSchema.of(plan).up
    received = content.array_records
    if set(received) != set(expected):
        raise UpdateRejected(
            "schema", f"{site.name}: a reply has exactly the array records {sorted(expected)}"
        )
    for record, shapes in expected.items():
        _check_schema(received[record], shapes, site.name, compressor)
    metrics = _metrics(content, site)
    start = plan.start.tensors()
    decoded = {
        record: {
            name: _decode(
                name,
                received[record][name],
                site.name,
                compressor,
                start.get(name) if record == ARRAYS else None,
            )
            for name in shapes
        }
        for record, shapes in expected.items()
    }
    for tensors in decoded.values():
        _check_finite(tensors, site.name)
    tensors = decoded.pop(ARRAYS)
    _check_norm(tensors, start, limits, site.name)
    for record in decoded.values():
        _check_norm(record, {}, limits, site.name)
    return ClientUpdate(
        site=site.name,
        examples=int(metrics.pop("num-examples")),
        tensors=tensors,
        start=plan.start,
        metrics=metrics,
        records=decoded,
    )


def comparison(content: RecordDict, blocks: int) -> tuple[Tensor, Tensor, int] | None:
    """What a site says of the model's blocks: similarities, importances, rows; None if unusable."""
    arrays = content.array_records.get(ARRAYS, ArrayRecord())
    metrics: Any = content.metric_records.get("metrics", {})
    sizes = {"similarity": blocks * (blocks - 1) // 2, "importance": blocks}
    rows = metrics.get("num-examples")
    if set(arrays) != set(sizes) or not isinstance(rows, int) or rows < 1:
        return None
    try:
        _check_schema(arrays, {name: (size,) for name, size in sizes.items()}, "a client")
        similarity, importance = (_decode(name, arrays[name], "a client") for name in sizes)
    except UpdateRejected:
        return None
    alike = bool(((similarity >= 0) & (similarity <= 1)).all())
    return (similarity, importance, rows) if alike and bool(importance.isfinite().all()) else None


def _check_schema(
    arrays: ArrayRecord, expected: Shapes, site: str, compressor: Compressor = FP32
) -> None:
    if set(arrays) != set(expected):
        extra, missing = set(arrays) - set(expected), set(expected) - set(arrays)
        raise UpdateRejected(
            "keys", f"{site}: {len(missing)} tensors missing, {len(extra)} not asked for"
        )
    for name, shape in expected.items():
        array = arrays[name]
        if tuple(array.shape) != shape:
            raise UpdateRejected("shape", f"{site}: {name} is {tuple(array.shape)}, not {shape}")
        size = len(array.data)
        compressor.admit(f"{site}: {name}", array.dtype, array.stype, shape, size)


def _decode(
    name: str,
    array: Array,
    site: str,
    compressor: Compressor = FP32,
    start: Tensor | None = None,
) -> Tensor:
    try:
        return unpacked(array, compressor, start)
    except Exception as error:  # any failure to decode hostile bytes is the same refusal
        raise UpdateRejected("format", f"{site}: {name} cannot be decoded: {error}") from error


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


def _check_finite(tensors: Mapping[str, Tensor], site: str) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateRejected("nan", f"{site}: {name} contains NaN or Inf")


def _check_norm(
    tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], limits: Limits, site: str
) -> None:
    if limits.update_norm is None:
        return
    change = math.sqrt(
        sum(float((t - start.get(n, 0)).double().square().sum()) for n, t in tensors.items())
    )
    if change > limits.update_norm:
        raise UpdateRejected("norm", f"{site}: moved by {change:.3g} > {limits.update_norm:.3g}")
