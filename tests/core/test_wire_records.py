"""Records beside the adapter on the wire; and without terms, the bytes that there always were."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from pydantic import Field
from torch import Tensor

from fedft.core import terms
from fedft.core.errors import MismatchError
from fedft.core.folding import fold
from fedft.core.terms import Shapes, Term
from fedft.core.types import (
    Adapter,
    ClientUpdate,
    EvalPlan,
    Factors,
    LocalTraining,
    Site,
    TrainPlan,
)
from fedft.core.wire import codec
from fedft.core.wire.changes import Packing
from fedft.core.wire.compress import FP32, Compressor, Int8, Key, compressor_of
from fedft.server.validation import Limits, validate
from tests.core.top_k import TopK

HEAD = "base_model.model.classifier.weight"


class Pull(Term):
    kind: Literal["pull"] = "pull"
    strength: Annotated[float, Field(ge=0, le=1e30)] = 1.0
    receives: ClassVar[frozenset[str]] = frozenset({"anchor"})
    sends: ClassVar[frozenset[str]] = frozenset({"drift", "count"})

    def shapes(self, record: str, start: Shapes, trained: Any) -> Shapes:
        return {"n": ()} if record == "count" else super().shapes(record, start, trained)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "TERMS", (Pull,))


def ramp(*shape: int, start: int) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + start).reshape(shape) / 64


def adapter() -> Adapter:
    factors = {
        f"block.{i}.q": Factors(ramp(2, 5, start=i), ramp(4, 2, start=-i), 0.5) for i in range(2)
    }
    return Adapter(factors, {HEAD: ramp(3, 4, start=7)})


def plan(**changes: Any) -> TrainPlan:
    anchor = {name: t + 1 for name, t in adapter().tensors().items()}
    fields = {"terms": (Pull(strength=0.5),), "records": {"anchor": anchor}, "site": "site-1"}
    return TrainPlan(adapter(), **{**fields, **changes})


# ── without terms ─────────────────────────────────────────────────────────────────────────────


def digest(content: RecordDict) -> str:
    """Of every byte and every word of a message, in order."""
    seen = hashlib.sha256()
    for name, record in content.items():
        seen.update(f"{name} {type(record).__name__}\n".encode())
        for key, value in record.items():
            if isinstance(value, Array):
                about = f"{key} {value.dtype} {list(value.shape)} {value.stype}\n"
                seen.update(about.encode() + value.data)
            else:
                seen.update(f"{key} {value!r}\n".encode())
    return seen.hexdigest()


# Made by the commit before there were terms, from the plan in the test.
GOLDEN = {
    "fp32": (
        "718781277d269d708374c58405ece014d8a6808ab44000e632b8cea594fa862e",
        "bc13be3668a908c749c63a31f1477726f8d504856d6cdc10e71c4683ae50cf9b",
        "671e3f2c579c677cb673ea05c459f7add6847a8645abd6124d9876805602c3b5",
        (336, 192),
    ),
    "bf16": (
        "8c0bf474c4373982d296e53933387f99cc7c28cdef0b121842efa2aca2b87cde",
        "da38062f80b5141fd4352f879a58a4ea400a9c68765ae60fecbf564a1bb39017",
        "39858366cda5c57cd2172d40c9ead66b05fb6737ff4f6969d422183176898aef",
        (168, 96),
    ),
}


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_messages_without_terms_have_the_bytes_they_always_had(wire: str) -> None:
    cast = compressor_of(wire)
    start, encoder = adapter(), codec.Encoder('{"task": 1}', cast)
    training = LocalTraining(proximal_mu=0.1)
    plain = TrainPlan(
        start, start.factors, layers=(0,), training=training, round=3, site="site-1", seed=5
    )
    judged = EvalPlan(start, start.factors, round=3, site="x")
    assert GOLDEN[wire] == (
        digest(encoder.train(plain)),
        digest(encoder.evaluate(judged)),
        digest(codec.packed_reply(plain.sent(), 7, {"loss": 0.5}, Packing(cast))[0]),
        codec.plan_bytes(plain, cast),
    )
    assert digest(encoder.train(plan())) not in GOLDEN[wire]  # control: a term is in the bytes


# ── with them ─────────────────────────────────────────────────────────────────────────────────


def reply(asked: TrainPlan, one: Compressor = FP32) -> RecordDict:
    records = {
        record: {name: torch.full(shape, 2.5) for name, shape in shapes.items()}
        for record, shapes in asked.schema("sends").items()
    }
    packing = Packing(one, Key(0, 1, asked.site), asked.start.tensors())
    return codec.packed_reply(asked.sent(), 7, {"loss": 0.5}, packing, records)[0]


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
def test_records_come_back_and_count_as_many_bytes_as_the_plan_says(wire: str) -> None:
    asked, one = plan(), compressor_of(wire)
    content = codec.Encoder("{}", one).train(asked)
    back = codec.train_plan(content, adapter(), 0)
    assert back.terms == asked.terms
    for name, tensor in asked.records["anchor"].items():
        exact = tensor.bfloat16().float() if wire == "bf16" else tensor
        assert torch.equal(back.records["anchor"][name], exact)
    answer = reply(asked, one)
    sizes = tuple(codec.content_bytes(c) for c in (content, answer))
    assert sizes == codec.plan_bytes(asked, one)
    adapters = 2 * (10 + 8) + 12
    by_hand = {
        "fp32": (8 * adapters, 4 * (2 * adapters + 1)),
        "bf16": (4 * adapters, 2 * (2 * adapters + 1)),
        "int8": (8 * adapters, 2 * adapters + 1 + 4 * (5 + 5 + 1)),  # a scale a tensor
    }
    assert sizes == by_hand[wire]
    update = validate(answer, asked, Site("site-1", 9), Limits(), one)
    assert set(update.records) == {"drift", "count"}
    for tensors in update.records.values():
        assert all(torch.allclose(t, torch.tensor(2.5), atol=0.02) for t in tensors.values())


def test_what_is_left_out_of_a_record_is_kept_apart_from_what_is_of_the_adapter() -> None:
    """Tensors of two records have one name, and each has a remainder of its own."""
    packing = Packing(TopK(share=0.5), Key(), {"x": torch.zeros(4)})
    mine, of_record = torch.tensor([4.0, 3, 2, 1]), torch.tensor([10.0, 20, 30, 40])
    content, left = codec.packed_reply({"x": mine}, 1, {}, packing, {"drift": {"x": of_record}})
    assert {name: t.tolist() for name, t in left.items()} == {
        "x": [0, 0, 2, 1], "drift/x": [10, 20, 0, 0],
    }  # fmt: skip
    again = replace(packing, left=left)
    content, left = codec.packed_reply({"x": mine}, 1, {}, again, {"drift": {"x": of_record}})
    assert {name: t.tolist() for name, t in left.items()} == {
        "x": [0, 3, 0, 2], "drift/x": [20, 0, 30, 0],
    }  # fmt: skip
    sent = TopK(share=0.5).decode(content.array_records["drift"]["x"])
    assert torch.equal(sent + left["drift/x"], of_record + torch.tensor([10.0, 20, 0, 0]))


def test_a_record_is_rounded_by_draws_of_its_own() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    content, _ = codec.packed_reply({"x": x}, 1, {}, Packing(Int8()), {"drift": {"x": x}})
    adapter_, drift = (content.array_records[name]["x"].data for name in ("arrays", "drift"))
    assert adapter_ != drift


def test_one_record_in_many_plans_is_sent_once() -> None:
    encoder, asked = codec.Encoder("{}"), plan()
    first = encoder.train(asked).array_records["anchor"]
    again = plan(site="site-2", records={"anchor": dict(asked.records["anchor"])})
    assert encoder.train(again).array_records["anchor"] is first
    other = plan(records={"anchor": {n: t.clone() for n, t in asked.records["anchor"].items()}})
    assert encoder.train(other).array_records["anchor"] is not first


def test_a_rule_that_sends_no_record_is_told_so() -> None:
    with pytest.raises(ValueError, match="the plan for 'site-1' lacks the record 'anchor'"):
        codec.Encoder("{}").train(plan(records={}))


def lies() -> Iterator[Any]:
    def with_record(content: RecordDict, **tensors: Array | None) -> None:
        arrays = {**content.array_records["anchor"], **tensors}
        content["anchor"] = ArrayRecord({n: a for n, a in arrays.items() if a is not None})

    def missing(content: RecordDict) -> None:
        del content["anchor"]

    def short(content: RecordDict) -> None:
        with_record(content, **{HEAD: None})

    def extra(content: RecordDict) -> None:
        with_record(content, more=Array(torch.ones(2).numpy()))

    def turned(content: RecordDict) -> None:
        with_record(content, **{HEAD: Array(torch.ones(4, 3).numpy())})

    def nan(content: RecordDict) -> None:
        with_record(content, **{HEAD: Array(torch.full((3, 4), torch.nan).numpy())})

    def more(content: RecordDict) -> None:
        content["drift"] = content.array_records["anchor"]

    yield from (missing, short, extra, turned, nan, more)


@pytest.mark.parametrize("lie", list(lies()), ids=lambda lie: lie.__name__)
def test_a_client_takes_no_record_that_is_not_what_the_plan_says(lie: Any) -> None:
    content = codec.Encoder("{}").train(plan())
    codec.train_plan(content, adapter(), 0)  # control
    lie(content)
    with pytest.raises(MismatchError, match="plan"):
        codec.train_plan(content, adapter(), 0)


# ── folding ───────────────────────────────────────────────────────────────────────────────────


def test_the_mean_of_records_by_hand() -> None:
    start = adapter()

    def update(site: str, examples: int, value: float) -> ClientUpdate:
        records = {"drift": {HEAD: torch.full((3, 4), value)}, "count": {"n": torch.tensor(value)}}
        return ClientUpdate(site, examples, start.tensors(), start, records=records)

    mean = fold([update("a", 1, 1.0), update("b", 3, 5.0), update("c", 0, 99.0)]).mean_update(start)
    assert mean.records.keys() == {"drift", "count"}
    assert torch.equal(mean.records["drift"][HEAD], torch.full((3, 4), 4.0))
    assert float(mean.records["count"]["n"]) == 4.0
