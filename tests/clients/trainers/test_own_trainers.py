"""What a trainer of one's own may do to its model, and what it may not, without a run around it."""

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedft.clients.engines import copied as copies
from fedft.clients.engines import own_code
from fedft.core.errors import MismatchError, UpdateRejected
from fedft.core.terms import ControlVariates
from fedft.core.trainers import TrainerSettings
from fedft.core.types import LocalTraining, TrainPlan
from tests.clients.trainers import own_trainers
from tests.clients.trainers.conftest import Room

FFA = frozenset({"B", "head"})


def trained(room: Room, trainer: str, plan: TrainPlan | None = None) -> Any:
    return room.engine(trainer).train([plan or room.plan()], [[]])[0]


def test_the_plans_tensors_come_back_and_the_loss_and_the_steps_of_train(room: Room) -> None:
    plan = room.plan()
    found = trained(room, "plain", plan)
    before, after = plan.start.tensors(), found.adapter.tensors()
    assert after.keys() == before.keys()
    assert all(after[n].shape == t.shape and after[n].dtype == t.dtype for n, t in before.items())
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert any("lora_B" in n for n in moved) and any("classifier" in n for n in moved)
    rows = len(room.rows.of("site-1"))
    assert found.metrics["steps"] == -(-rows // 4) and 0 < found.metrics["loss"] < 3
    assert found.records == {}


def test_the_function_is_told_what_it_needs(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, list[dict[str, Any]], TrainerSettings]] = []

    def look(model: Any, rows: Any, settings: Any) -> Any:
        told.append((model, rows, settings))
        assert Path(settings.output_folder).is_dir()
        return own_trainers.plain(model, rows, settings)

    engine = room.engine("plain")
    monkeypatch.setattr(engine, "_make", look)
    engine.train([room.plan(round=3, site="site-2")], [[]])
    ((model, rows, settings),) = told
    own = room.bench.data.train.subset(room.bench.rows(2)[0])
    assert type(model).__name__ == "PeftModel" and not model.training
    assert len(rows) == len(own) and all(row.keys() == {"text", "label"} for row in rows)
    ids = [room.bench.data.classes.index(row["label"]) for row in rows]
    assert ids == own.collate(np.arange(len(own))).labels.tolist()  # the very rows, in order
    assert (settings.client, settings.round, settings.max_length) == ("site-2", 3, 128)
    assert settings.training == room.config.training.local()
    assert settings.classes == ("animal", "plant", "tool") and settings.device == "cpu"
    assert settings.tokenizer("the fur")["input_ids"]
    assert 0 <= settings.seed < 2**32
    assert not Path(settings.output_folder).exists()


def test_only_what_the_plan_trains_requires_a_gradient(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[frozenset[str], set[str]] = {}

    def look(model: Any, rows: Any, settings: Any) -> Any:
        seen[parts] = {n for n, p in model.named_parameters() if p.requires_grad}
        return own_trainers.plain(model, rows, settings)

    engine = room.engine("plain")
    monkeypatch.setattr(engine, "_make", look)
    for parts in (FFA, frozenset({"A", "B", "head"})):
        engine.train([room.plan(train=parts)], [[]])
    assert not any("lora_A" in name for name in seen[FFA])
    extra = seen[parts] - seen[FFA]
    assert extra and all("lora_A" in name for name in extra)


def test_the_same_client_and_round_give_the_same_bytes_and_others_do_not(room: Room) -> None:
    def found(**changes: Any) -> torch.Tensor:
        tensors = trained(room, "plain", room.plan(**changes)).adapter.tensors()
        return torch.cat([t.flatten() for t in tensors.values()])

    first = found()
    torch.manual_seed(99)  # what a process drew before does not matter
    random.seed(99)
    assert torch.equal(found(), first)
    assert not torch.equal(found(round=2), first)
    assert not torch.equal(found(seed=1), first)


def test_what_it_does_to_the_process_and_to_its_model_is_gone_after_it(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    control = trained(room, "plain")
    environment, here = dict(os.environ), Path.cwd()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    training = [module.training for module in room.bench.engine.base.model.modules()]
    untidy = trained(room, "Untidy")
    assert untidy.adapter.tensors().keys() == control.adapter.tensors().keys()
    assert dict(os.environ) == environment and Path.cwd() == here
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert [m.training for m in room.bench.engine.base.model.modules()] == training
    assert capsys.readouterr().out == ""
    again = trained(room, "plain")  # no hook, no half precision, no padding token of before
    for name, tensor in control.adapter.tensors().items():
        assert torch.equal(again.adapter.tensors()[name], tensor)
    assert room.reloads == 0


WRONG = {
    "raises": r"own_trainers.py:\d+ in raises: KeyError: 'colour'",
    "RaisesInside": r"own_trainers.py:\d+ in after: AttributeError: .*no_such_thing",
    "none": "returned None$",
    "no_train": r"returned a SimpleNamespace, which has no train\(\); wrap it .* calls fit\(\)",
    "exits": r"own_trainers.py:\d+ in exits: it called sys.exit\(3\), which ends no run",
    "nothing": "trained nothing: every tensor is as it was",
    "ChangesTheBase": r"changed base_model\..* of the frozen base, which all clients share",
    "ChangesTheBaseUnseen": r"changed base_model\..* of the frozen base, which all clients share",
    "NaN": "left NaN or Inf in base_model",
    "NaNLoss": "says training_loss = nan",
    "Shape": r"left base_model.* in the shape \[1, 32\], and it was \[4, 32\]",
    "wraps": "was the model wrapped again?",
    "merges": r"changed base_model\..* of the frozen base, which all clients share",
    "LeavesAThread": "left the thread 'forgotten' running",
    "LeavesAProcess": r"left the process \d+ running",
}


@pytest.mark.parametrize("trainer", WRONG)
def test_each_mistake_is_told_and_costs_the_next_client_nothing(
    room: Room, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_code, "_ENDING_S", 0.5)
    control = trained(room, "quick").adapter.tensors()
    with pytest.raises(UpdateRejected, match=WRONG[trainer]) as caught:
        trained(room, trainer)
    assert caught.value.reason == "trainer"
    if trainer == "raises":  # the line is that of the raise
        number = int(re.findall(r"\.py:(\d+)", caught.value.what)[0])
        line = Path(own_trainers.__file__).read_text().splitlines()[number - 1]
        assert 'raise KeyError("colour")' in line
    again = trained(room, "quick").adapter.tensors()
    assert all(torch.equal(again[name], control[name]) for name in control)
    assert room.reloads == ("frozen base" in WRONG[trainer])


def test_without_the_look_at_the_base_the_next_client_trains_on_another_one(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: the guard is what finds it."""
    control = trained(room, "quick").adapter.tensors()
    monkeypatch.setattr(copies, "_sum", lambda weight: 0)
    trained(room, "ChangesTheBase")
    again = trained(room, "quick").adapter.tensors()
    assert not all(torch.equal(again[name], control[name]) for name in control)


def test_what_the_plan_leaves_as_it_is_may_not_move(room: Room) -> None:
    """FFA-LoRA keeps A; a trainer that trains it all the same is refused with the reason."""
    trained(room, "plain", room.plan(train=FFA))
    with pytest.raises(
        UpdateRejected, match=r"had .*lora_A.* trained, which no plan has|leaves as"
    ):
        trained(room, "TrainsWhatIsFrozen", room.plan(train=FFA))
    trained(room, "TrainsWhatIsFrozen")  # where the plan trains it, it may


def test_a_base_that_a_rule_has_shifted_is_put_back_as_it_was(room: Room) -> None:
    start = room.bench.initial(4)
    delta = {m: replace(f, B=torch.ones_like(f.B)) for m, f in start.factors.items()}
    control = trained(room, "quick", room.plan(delta=delta)).adapter.tensors()
    with pytest.raises(UpdateRejected, match="frozen base"):
        trained(room, "ChangesTheBase", room.plan(delta=delta))
    again = trained(room, "quick", room.plan(delta=delta)).adapter.tensors()
    assert all(torch.equal(again[name], control[name]) for name in control)
    other = trained(room, "quick").adapter.tensors()
    assert not all(torch.equal(other[name], control[name]) for name in control)


@pytest.mark.parametrize("rank", [1, 2])
def test_clients_of_a_lower_rank_train_at_theirs(room: Room, rank: int) -> None:
    found = trained(room, "quick", room.plan(rank=rank)).adapter
    assert found.rank == rank


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"training": LocalTraining(dp_noise=1.0)}, "the noise of DP-SGD"),
        ({"training": LocalTraining(proximal_mu=0.1)}, "a proximal term"),
        ({"training": LocalTraining(tail_penalty=0.1)}, "a penalty on the tail of the rank"),
        ({"terms": (ControlVariates(),)}, "the term 'control-variates'"),
        ({"layers": (0,)}, "a part of the blocks"),
        ({"heads": (0,)}, "some heads of several"),
    ],
)
def test_a_plan_that_asks_for_more_is_refused_by_name(
    room: Room, changes: dict[str, Any], asked: str
) -> None:
    with pytest.raises(MismatchError, match=f"asks for {asked}, which the trainer .*plain"):
        trained(room, "plain", room.plan(**changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (0,)])
def test_a_fingerprint_changes_with_any_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = (torch.rand(shape) * 100).to(dtype)
    before = copies.fingerprints({"w": weight})
    assert copies.fingerprints({"w": weight.clone()}) == before
    flat = weight.view(-1)
    for i in range(flat.numel()):
        other = weight.clone()
        bits = other.view(-1)[i : i + 1].view(torch.uint8)
        bits[0] ^= 1
        assert copies.fingerprints({"w": other}) != before, (dtype, shape, i)


def test_rows_keep_every_column_of_the_file(
    tiny_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Odd ones, too: a number, a list, a name that is no identifier, a label in two spellings."""
    data = tmp_path / "odd.csv"
    lines = ["text,label,the owner's,größe"]
    lines += [f'"the fur, {i}", {i % 2}.0 ,"a ""b""",{i}' for i in range(40)]
    lines[5] = lines[5].replace(".0 ", "")
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = tiny_table(data={"source": str(data), "partition": {"kind": "iid"}})
    odd = Room(table)
    rows = [row for index in range(8) for row in odd.rows.of(f"site-{index}")]
    assert len(rows) == len(odd.bench.data.train)
    for row in rows:
        assert list(row) == ["text", "label", "the owner's", "größe"]
        assert row["label"] == str(int(row["größe"]) % 2) and row["the owner's"] == 'a "b"'
        assert row["text"] == f"the fur, {row['größe']}"
    with pytest.raises(MismatchError, match=r"odd.csv:41 is not there any more|:\d+ is not there"):
        data.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
        fresh = Room.__new__(Room)
        fresh.__dict__.update(odd.__dict__)
        type(odd.rows)(odd.task, odd.bench.data, odd._rows_of).of("site-0")
