"""What metrics add up, as a client's reply carries it over gRPC, and what of it a server takes."""

import pytest
from flwr.app import MetricRecord, RecordDict

from fedft.core.errors import UpdateRejected
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import MAX_METRICS, MAX_NUMBERS, Assembly, describe
from fedft.core.metrics import METRICS, PER_CLASS, Sum, Tally, packed, unpacked

SUMS = {
    **METRICS["macro-f1"].sums,
    **PER_CLASS.sums,
    "one": Sum(lambda _: 1),
    "share": Sum(whole=False),
}


def over(record: dict[str, object]) -> dict[str, object]:
    content = RecordDict({"metrics": MetricRecord(record)})  # type: ignore[arg-type]
    header = pb.Content.FromString(describe(content).SerializeToString())
    return dict(Assembly(header, {}).content().metric_records["metrics"])


@pytest.mark.parametrize("classes", [2, 3, 140])
def test_lists_of_numbers_cross_grpc(classes: int) -> None:
    """Of 140 classes PER_CLASS has no matrix: an empty list, which a message does not show."""
    n = classes
    cells = tuple(range(n * n)) if n * n <= 128**2 else ()
    sums = {"confusion": (1,) * (n * n), "by-class": tuple(range(3 * n)), "cells": cells}
    tally = Tally(2.5, 10**6, {**sums, "one": (7,), "share": 0.125})
    if 1 + 2 + len(cells) + n * n + 3 * n > MAX_NUMBERS:
        with pytest.raises(UpdateRejected):
            over(packed(tally, SUMS))  # type: ignore[arg-type]
        return
    assert unpacked(over(packed(tally, SUMS)), SUMS, n) == tally  # type: ignore[arg-type]


def test_a_reply_of_other_lengths_or_with_numbers_of_no_items_is_not_used() -> None:
    good = packed(Tally(1.0, 5, {"by-class": (1, 1, 3, 2, 2, 3)}), METRICS["mcc"].sums)
    sums = METRICS["mcc"].sums
    assert unpacked(good, sums, 2) is not None
    for bad in ([1, 1, 3, 2, 2], [1, 1, 3, 2, 2, 6], [1, 1, 3, 2, 2, -1], [], 3, "x", [None] * 6):
        assert unpacked({**good, "by-class": bad}, sums, 2) is None
    assert unpacked({k: v for k, v in good.items() if k != "by-class"}, sums, 2) is None


def test_names_and_numbers_are_bounded() -> None:
    over({f"m{k}": 1 for k in range(MAX_METRICS)})
    with pytest.raises(UpdateRejected, match="metrics of"):
        over({f"m{k}": 1 for k in range(MAX_METRICS + 1)})
    over({"m": [1] * MAX_NUMBERS})
    with pytest.raises(UpdateRejected, match="numbers"):
        over({"m": [1] * (MAX_NUMBERS + 1)})
