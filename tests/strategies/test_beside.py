"""Records beside the adapter and the rules: what can be sent, and who is not told of any."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedft.core.errors import ConfigError
from fedft.core.terms import entries
from fedft.core.types import LARGEST_SENT, Adapter, Factors, ServerState, TrainPlan
from fedft.server.exchange import grouped
from fedft.server.grids.inline import InlineGrid
from fedft.strategies import RULES, FedAvgLoRA
from fedft.strategies.beside import check_beside, first_plan
from fedft.strategies.flower import FlowerStrategy
from fedft.strategies.sendable import check_sendable
from tests.server import drift


def adapter() -> Adapter:
    return Adapter({"q": Factors(torch.ones(1, 2), torch.zeros(2, 1), 1.0)})


def test_a_record_in_the_slots_is_within_the_range_of_the_wire() -> None:
    before = ServerState(adapter())
    name = next(iter(before.adapter.tensors()))
    largest = torch.finfo(torch.float32).max
    for slot, value, sent in (
        (entries("anchor", {name: 0}), LARGEST_SENT, True),
        (entries("anchor", {name: 0}), largest, False),
        ({f"rule/m/{name}": 0}, largest, True),  # control: it never travels
    ):
        slots = {key: torch.tensor([value]) for key in slot}
        after = replace(before, round=1, slots=slots)
        if sent:
            check_sendable("rule", before, after)
        else:
            with pytest.raises(ConfigError, match="anchor"):
                check_sendable("rule", before, after)


def test_no_rule_without_terms_is_refused() -> None:
    for rule in RULES:
        check_beside(rule(), first_plan(rule()).terms, dp_sgd=False)


def test_clients_of_different_terms_do_not_train_together() -> None:
    plain = TrainPlan(adapter())
    other = replace(plain, terms=(drift.Drift(),))
    assert grouped([plain, other, plain, other], size=4) == [[0, 2], [1, 3]]
    assert grouped([plain, plain], size=4) == [[0, 1]]


def test_flowers_own_loop_tells_nobody_of_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = InlineGrid(lambda message, context: Message(RecordDict(), reply_to=message), 2)

    def messages() -> object:
        made = FlowerStrategy(FedAvgLoRA(), adapter().tensors(), 1.0)
        return list(made.configure_train(1, ArrayRecord(), ConfigRecord(), grid))

    assert messages()  # control
    drift.at_server(monkeypatch)
    with pytest.raises(ConfigError, match="not told of any"):
        messages()
