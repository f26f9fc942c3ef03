"""Records beside the adapter over real gRPC: honest clients go on, those that lie in one do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict

import fedft.server.serve
from fedft.core.link.framing import Ticket
from fedft.server.checkpoints import Checkpoints
from fedft.server.config_file import parse_config
from tests.server import drift
from tests.server.stub_clients import Stub, answering, run_with

pytestmark = pytest.mark.grpc

Table = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _term(monkeypatch: pytest.MonkeyPatch) -> None:
    drift.at_clients(monkeypatch)
    drift.at_server(monkeypatch)
    monkeypatch.setattr(fedft.server.serve, "CLIENT_APP", answering)
    inline = fedft.server.serve.InlineGrid
    monkeypatch.setattr(
        fedft.server.serve, "InlineGrid", lambda app, nodes: inline(answering, nodes)
    )


def missing(arrays: dict[str, Array]) -> dict[str, Array] | None:
    return None


def short(arrays: dict[str, Array]) -> dict[str, Array]:
    return dict(list(arrays.items())[1:])


def extra(arrays: dict[str, Array]) -> dict[str, Array]:
    return {**arrays, "more": Array(np.ones(3, np.float32))}


def turned(arrays: dict[str, Array]) -> dict[str, Array]:
    name, array = next(iter(arrays.items()))
    return {**arrays, name: Array(array.numpy().T.copy())}


def nan(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: Array(a.numpy() * np.nan) for name, a in arrays.items()}


def huge(arrays: dict[str, Array]) -> dict[str, Array]:
    name, array = next(iter(arrays.items()))
    return {**arrays, name: Array(array.dtype, array.shape, array.stype, bytes(10_000_000))}


def infinite(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: Array(np.full(a.shape, 1e300)) for name, a in arrays.items()}


LIES = {
    missing: "schema",
    short: "keys",
    extra: "keys",
    turned: "shape",
    nan: "nan",
    huge: "size",
    infinite: "nan",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_client_that_lies_in_a_record_costs_itself_its_place(
    lie: Callable[[dict[str, Array]], dict[str, Array] | None], tiny_table: Table, tmp_path: Path
) -> None:
    def answer(ticket: Ticket, good: RecordDict) -> RecordDict:
        told = lie(dict(good.array_records["drift"]))
        if told is None:
            del good["drift"]
        else:
            good["drift"] = ArrayRecord(told)
        return good

    config = parse_config(
        tiny_table(
            engine={"verify": False},
            fleet={"clients": 3},
            rounds={"count": 2, "per-round": 3, "quorum": 2, "retries": 0, "deadline-s": 20},
        )
    )
    clients = {"ann": Stub(), "ben": Stub(), "eve": Stub(answer=answer)}
    run = run_with(config, tmp_path / "run", clients)
    assert [record["failures"] for record in run.rounds()] == [{LIES[lie]: ["eve"]}] * 2
    counted = [json.loads(x) for x in (run.path / "clients.jsonl").read_text().splitlines()]
    assert {x["site"] for x in counted if x["status"] == "ok"} == {"ann", "ben"}
    checkpoint = Checkpoints(run.checkpoints, keep=2).load()
    assert checkpoint is not None
    anchor = checkpoint.state.record("anchor")
    assert anchor and all(bool((t == 1).all()) for t in anchor.values())  # what stubs say
    sizes = sum(t.numel() for t in anchor.values())
    assert [record["bytes"]["up"] for record in run.rounds()] == [2 * 2 * 4 * sizes] * 2
    assert all(t.dtype == torch.float32 for t in anchor.values())
