"""A real client and records beside the adapter: on its disk, against its policy, in its ledger."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from fedft.clients.ledger import release_of
from fedft.clients.policy import Policy, plan_of
from fedft.clients.work import Failure
from fedft.core.errors import MismatchError, UpdateRejected
from fedft.core.link import framing
from fedft.core.link import link_pb2 as pb
from fedft.core.link.framing import Assembly, Ticket, chunks, describe
from fedft.core.types import LocalTraining, TrainPlan
from fedft.core.wire import codec
from tests.clients.test_ledger import DP, Desk
from tests.server import drift

PLAIN = LocalTraining(batch_size=6, steps=2)


@pytest.fixture
def desk(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Desk:
    drift.at_clients(monkeypatch)
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(tiny_data.read_text().splitlines()[:30]) + "\n")
    return Desk(tiny_model, own, tmp_path, run=tmp_path.name)


def plan(desk: Desk, round_: int, **changes: Any) -> TrainPlan:
    bare = TrainPlan(desk.start, terms=(drift.Drift(),), training=PLAIN, round=round_, site="ann")
    anchor = {n: torch.full(s, 4.0) for n, s in bare.schema("receives")["anchor"].items()}
    return replace(bare, records={"anchor": anchor}, **changes)


def train(desk: Desk, round_: int, *, run: str | None = None, **changes: Any) -> Any:
    content = codec.Encoder("{}").train(plan(desk, round_, **changes))
    return desk.work("train", content, run or desk.run, round_)


def count(answer: Any) -> float:
    """Trainings so far, out of what came back: ``c + a / 2`` with a = 4."""
    assert isinstance(answer, RecordDict), answer
    tensors = codec.tensors_from(answer.array_records["drift"])
    (value,) = {float(x) for t in tensors.values() for x in t.flatten()}
    return value - 2


def judged(desk: Desk, round_: int, *, counted: bool) -> None:
    desk.resident.judged(Ticket(desk.run, round_, "ann", "train", "base"), counted=counted)


def test_what_stays_lies_on_disk_and_a_round_that_comes_again_starts_from_before_it(
    desk: Desk,
) -> None:
    assert count(train(desk, 1)) == 1
    judged(desk, 1, counted=True)
    assert count(train(desk, 2)) == 2
    assert count(train(desk, 2)) == 2  # the server died, and asks again
    judged(desk, 2, counted=False)
    assert count(train(desk, 3)) == 2, "round 2 did not count"
    judged(desk, 3, counted=True)
    again = Desk(
        Path(desk.task.model.source), desk.resident.site.data, Path(_folder(desk)), desk.run
    )
    assert count(train(again, 4)) == 3, "another process finds it"
    assert not isinstance(desk.work("evaluate", _judge(desk), desk.run, 4), Failure)


def _folder(desk: Desk) -> Path:
    return desk.resident.kept.folder.parent


def _judge(desk: Desk) -> RecordDict:
    from fedft.core.types import EvalPlan

    return codec.Encoder("{}").evaluate(EvalPlan(desk.start, split="holdout", round=4, site="ann"))


def test_a_state_of_another_rank_is_told_by_name(desk: Desk) -> None:
    train(desk, 1)
    state = desk.resident.kept.before(Ticket(desk.run, 2, "ann", "train", "base"))
    name = next(n for n in state.array_records[codec.KEPT] if "lora_A" in n)
    arrays = {n: codec.tensor_from(a) for n, a in state.array_records[codec.KEPT].items()}
    arrays[name] = torch.ones(3, 3)
    desk.resident.kept.store(
        Ticket(desk.run, 1, "ann", "train", "base"),
        RecordDict({codec.KEPT: codec.arrays_from(arrays)}),
    )
    answer = train(desk, 2)
    assert isinstance(answer, Failure) and "its rank has changed" in answer.details


def test_an_unknown_term_ends_in_a_sentence(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    content = codec.Encoder("{}").train(plan(desk, 1))
    text = str(content.config_records["config"]["plan"])
    plan_of("train", text)  # control
    fields = json.loads(text)
    for kind in ("os:system", "tests.server.drift:Drift", "unheard-of"):
        strange = json.dumps({**fields, "terms": [{"kind": kind}]})
        with pytest.raises(MismatchError, match="no term of local training"):
            plan_of("train", strange)
        with pytest.raises(MismatchError, match="no term of local training"):
            desk.resident.expected(strange, pb.Content())
        answer = desk.resident.work(Ticket(desk.run, 1, "ann", "train", "b"), strange, content)
        assert isinstance(answer, Failure) and answer.reason == "plan"
    for terms in ({"kind": "drift"}, [1], [{"kind": "drift", "more": 1}], [{"kind": "drift"}] * 17):
        with pytest.raises(MismatchError):
            plan_of("train", json.dumps({**fields, "terms": terms}))
    judge = json.loads(str(_judge(desk).config_records["config"]["plan"]))
    with pytest.raises(MismatchError):  # a plan to evaluate has no terms
        plan_of("evaluate", json.dumps({**judge, "terms": [{"kind": "drift"}]}))


def test_the_header_of_work_is_held_to_the_schema_before_a_byte_is_taken(desk: Desk) -> None:
    content = codec.Encoder("{}").train(plan(desk, 1))
    text = str(content.config_records["config"]["plan"])
    del content["config"]
    header = describe(content)
    expected = desk.resident.expected(text, header)
    taken = Assembly(header, expected)
    for data in chunks(content):
        taken.feed(data)
    assert taken.complete
    assert set(taken.content().array_records) == {"arrays", "anchor"}
    bare = json.dumps({k: v for k, v in json.loads(text).items() if k != "terms"})
    with pytest.raises(UpdateRejected, match="records"):
        framing.check(header, desk.resident.expected(bare, header))
    (anchor,) = (record for record in header.records if record.name == "anchor")
    anchor.arrays[0].shape[0] = 10**9
    with pytest.raises(UpdateRejected, match="not"):
        framing.check(header, expected)
    anchor.name = "drift"  # what goes up does not come down
    with pytest.raises(UpdateRejected, match="records"):
        framing.check(header, expected)


def test_records_count_towards_the_size_that_a_policy_allows(desk: Desk) -> None:
    size = sum(t.numel() for t in desk.start.tensors().values())
    site = desk.resident.site
    for factor, ends_in in ((5, RecordDict), (4.9, Failure)):
        allowed = Policy(most_parameters=int(factor * size))
        desk.resident.site = replace(site, policy=allowed)
        # Beside the adapter: one record down, one up, and twice the one that stays. R is counted in.
        answer = train(desk, 1)
        if ends_in is Failure:
            assert isinstance(answer, Failure) and answer.reason == "limits"
            assert "beside it" in answer.details
        desk.resident.site = replace(site, policy=Policy(most_parameters=10 * size))
        assert isinstance(train(desk, 1), RecordDict)  # control


def test_a_record_that_leaves_is_covered_by_no_noise(desk: Desk) -> None:
    content = codec.Encoder("{}").train(plan(desk, 1, training=DP))
    fields = json.loads(str(content.config_records["config"]["plan"]))
    assert release_of("train", fields, 30).mechanism == "none"
    bare = {name: value for name, value in fields.items() if name != "terms"}
    assert release_of("train", bare, 30).mechanism == "dp-sgd"  # control
    desk.resident.site = replace(desk.resident.site, policy=Policy(least_noise=1.0))
    answer = train(desk, 1, training=DP)
    assert isinstance(answer, Failure) and answer.reason == "privacy"
    assert isinstance(desk.train(DP), RecordDict)  # control: the same plan without the term
