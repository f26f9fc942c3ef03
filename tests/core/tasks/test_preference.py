"""Preferences: their forms, the loss by hand, the reference, and what training does to answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedft.clients.engines import ENGINES
from fedft.clients.engines.base import Engine
from fedft.clients.engines.by_example import own_gradients, recording
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.clients.engines.references import References
from fedft.core.adapters import family_of
from fedft.core.data.batches import batches
from fedft.core.data.source import Data, prepare
from fedft.core.errors import ConfigError, MismatchError
from fedft.core.models import initial_adapter, input_encoder, load_base, schema
from fedft.core.models.start import drawn
from fedft.core.seeds import torch_generator
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec, TaskSpec
from fedft.core.tasks import Preference, task_of
from fedft.core.tasks.preference_rows import Unfit, pair_of
from fedft.core.text.asked import Asked
from fedft.core.text.special_tokens import TextEncoder
from fedft.core.types import Batch, Factors, LocalTraining, Origin, TrainPlan
from tests.core.tasks.cases import CASES, VOCABULARY, Row, rows_of
from tests.core.tasks.test_laws import data_of, written

LORA = LoraSpec(rank=2, alpha=8.0, target_modules=("q_proj", "v_proj"))
TEMPLATE = (
    "{% for m in messages %}{{ 'the ' + m['role'] + ' ' + m['content'] + '[EOS]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'the assistant ' }}{% endif %}"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# ------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("fur", "tail", "leaf"), (("fur",), ("user",), "tail", "leaf")),
        ((None, "a fur tail", "a fur leaf"), (("a fur",), (), " tail", " leaf")),
        # They part within a word: the answers begin with it.
        ((None, "the cat", "the car"), (("the",), (), " cat", " car")),
        # One goes on where the other ends: its last word is its answer.
        ((None, "Q: é\n\nA: ja", "Q: é\n\nA: ja ja"), (("Q: é\n\nA:",), (), " ja", " ja ja")),
        ((None, "Q?\nyes", "Q?\nno"), (("Q?\n",), (), "yes", "no")),
        (
            ([said("system", "s"), said("user", "u")], [said("assistant", "a")], [said("assistant", "b")]),
            (("s", "u"), ("system", "user"), "a", "b"),
        ),
        (
            (None, [said("user", "u"), said("assistant", "a")], [said("user", "u"), said("assistant", "b")]),
            (("u",), ("user",), "a", "b"),
        ),
        (  # a prompt beside whole conversations, as in UltraFeedback
            ("u", [said("user", "u"), said("assistant", "a")], [said("user", "u"), said("assistant", "b")]),
            (("u",), ("user",), "a", "b"),
        ),
        (("u", [said("assistant", "a")], [said("assistant", "b")]), (("u",), ("user",), "a", "b")),
    ],
)  # fmt: skip
def test_every_form_comes_to_a_prompt_and_two_answers(values: Any, expected: Any) -> None:
    texts, roles, chosen, rejected = expected
    found = pair_of(*values)
    assert (found.prompt, found.chosen, found.rejected) == (Asked(texts, roles), chosen, rejected)


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        ((None, "yes", "no"), "rejected", "do not begin alike"),
        ((None, "same here", "same here"), "rejected", "are the same"),
        (("p", "same", "same"), "rejected", "are the same"),
        ((None, "a  ", "a b"), "rejected", "one of the answers is empty"),
        (("p", "text", [said("assistant", "b")]), "rejected", "not both texts"),
        (([said("user", "u")], "a", "b"), "prompt", "messages, where chosen and rejected are texts"),
        ((None, [said("assistant", "a")], [said("assistant", "b")]), "rejected", "do not begin alike"),
        ((None, [said("user", "u")], [said("user", "u"), said("assistant", "b")]), "chosen", "one message"),
        (
            ([said("user", "u")], [said("assistant", "a"), said("user", "v")], [said("assistant", "b")]),
            "chosen",
            "one message of the assistant",
        ),
        (
            ([said("user", "u"), said("assistant", "x")], [said("assistant", "a")], [said("assistant", "b")]),
            "prompt",
            "ends in an answer",
        ),
        (
            ("other", [said("user", "u"), said("assistant", "a")], [said("user", "u"), said("assistant", "b")]),
            "prompt",
            "not what chosen and rejected begin with",
        ),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_told(values: Any, key: str, reason: str) -> None:
    with pytest.raises(Unfit, match=reason) as caught:
        pair_of(*values)
    assert caught.value.key == key


def test_texts_and_messages_become_the_same_rows(folder_of: Any, tmp_path: Path) -> None:
    """By a chat template; a system turn adds its own tokens to both rows, and no target."""
    folder = folder_of("preference")
    encoder = input_encoder(ModelSpec(source=str(folder), task="preference"), folder)
    encoder.tokenizer.chat_template = TEMPLATE
    encoder = TextEncoder.of(encoder.tokenizer)
    answers = {"chosen": [said("assistant", "tail")], "rejected": [said("assistant", "leaf")]}
    user, system = said("user", "fur"), said("system", "old")
    forms: list[Row] = [
        {"prompt": "fur", "chosen": "tail", "rejected": "leaf"},
        {"prompt": [user], **answers},
        {k: [user, *v] for k, v in answers.items()},
        {"prompt": [system, user], **answers},
    ]
    found = []
    for at, row in enumerate(forms):
        source = written(tmp_path / f"{at}.jsonl", [row] * 4)
        data = prepare(DataSpec(source=source, test_fraction=0), "preference", encoder)
        found.append(data.train.collate(np.array([0])))
        form = "texts" if at == 0 else "conversations"
        assert any(form in note for note in data.notes)
        assert any("in common" in note for note in data.notes) == (at == 2)
    words = [[VOCABULARY[i] for i in row] for row in found[0].inputs["input_ids"].tolist()]
    assert words == [
        ["the", "[UNK]", "fur", "[EOS]", "the", "[UNK]", answer, "[EOS]"]
        for answer in ("tail", "leaf")
    ]
    for other in found[1:3]:
        assert torch.equal(other.inputs["input_ids"], found[0].inputs["input_ids"])
        assert torch.equal(other.labels, found[0].labels)
    scored = [row[row != -100].tolist() for batch in found for row in batch.labels]
    assert scored == [[VOCABULARY.index(w), 2] for w in ("tail", "leaf")] * 4
    assert found[3].labels.shape[1] == found[0].labels.shape[1] + 4


def test_conversations_need_a_template_that_takes_them(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("preference")
    row = {
        "prompt": [said("system", "old"), said("user", "fur")],
        "chosen": [said("assistant", "tail")],
        "rejected": [said("assistant", "leaf")],
    }
    spec = DataSpec(source=written(tmp_path / "rows.jsonl", [row] * 3), test_fraction=0)
    encoder = input_encoder(ModelSpec(source=str(folder), task="preference"), folder)
    with pytest.raises(MismatchError, match=r"rows\.jsonl:1: a conversation needs a chat template"):
        prepare(spec, "preference", encoder)
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    encoder.tokenizer.chat_template = refuses + TEMPLATE
    told = (
        r"rows\.jsonl:1: the chat template refuses turns of system, user \(TemplateError: no system"
    )
    with pytest.raises(MismatchError, match=told):
        prepare(spec, "preference", TextEncoder.of(encoder.tokenizer))


def test_a_column_without_which_data_may_be_is_still_found_by_its_given_name(
    folder_of: Any, tmp_path: Path
) -> None:
    folder, rows = folder_of("preference"), rows_of(CASES["preference"], 8)
    named = [{"question": r["prompt"], **{k: r[k] for k in ("chosen", "rejected")}} for r in rows]
    spec = DataSpec(source=written(tmp_path / "rows.jsonl", named), test_fraction=0)
    encoder = input_encoder(ModelSpec(source=str(folder), task="preference"), folder)
    own = prepare(spec.model_copy(update={"prompt": "question"}), "preference", encoder)
    plain = DataSpec(source=written(tmp_path / "plain.jsonl", rows), test_fraction=0)
    assert own.train.fingerprint() == prepare(plain, "preference", encoder).train.fingerprint()
    with pytest.raises(MismatchError, match=r"no column 'asked' \(data\.prompt\)"):
        prepare(spec.model_copy(update={"prompt": "asked"}), "preference", encoder)


# -------------------------------------------------------------------------------------- loss


def test_the_loss_by_hand() -> None:
    """beta = 0.5; the chosen answer e^2 times likelier than it was, the rejected one e^-1 times."""
    own, reference = torch.tensor([-1.0, -6.0, -3.0, -3.0]), torch.tensor([-3.0, -5.0, -3.0, -3.0])

    def losses(**table: Any) -> list[float]:
        task = task_of("preference").with_objective({"beta": 0.5, **table})
        rewards, targets = task.referred(own, reference)
        assert rewards.tolist() == [[1.0, -0.5], [0.0, 0.0]] and targets.tolist() == [0, 0]
        assert task.predicted(rewards).tolist() == [0, 1]  # a tie is not right
        return task.loss(rewards, targets, "none").tolist()

    right, wrong = np.log1p(np.exp(-1.5)), np.log1p(np.exp(1.5))
    ln2 = np.log(2)
    assert losses() == pytest.approx([right, ln2])
    assert losses(**{"label-smoothing": 0.1}) == pytest.approx([0.9 * right + 0.1 * wrong, ln2])
    robust = losses(**{"label-smoothing": 0.1, "loss": "robust"})
    assert robust == pytest.approx([(0.9 * right - 0.1 * wrong) / 0.8, ln2])
    assert losses(loss="hinge") == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"beta": 0}, "objective.beta"),
        ({"label-smoothing": 0.5}, "objective.label-smoothing"),
        ({"loss": "ipo"}, "objective.loss"),
        ({"loss": "hinge", "label-smoothing": 0.1}, "not of hinge"),
        ({"gamma": 1.0}, "objective.gamma"),
    ],
)
def test_an_objective_that_cannot_be_is_told(table: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ModelSpec(task="preference", objective=table)


def test_an_objective_is_of_the_task_and_written_only_where_there_is_one() -> None:
    with pytest.raises(ValueError, match="the loss of classification has nothing to be set"):
        ModelSpec(objective={"beta": 0.1})
    assert "objective" not in ModelSpec(task="preference").model_dump_json()
    own = ModelSpec(task="preference", objective={"beta": 0.3, "loss": "hinge"})
    again = ModelSpec.model_validate_json(own.model_dump_json())
    assert again == own
    rewards, _ = again.kind.referred(torch.tensor([1.0, 0.0]), torch.zeros(2))
    assert rewards.tolist() == [[pytest.approx(0.3), 0.0]]


# --------------------------------------------------------------------------------- reference


def model_spec(folder: Path) -> ModelSpec:
    return ModelSpec(source=str(folder), task="preference")


def naive(folder: Path, batch: Batch) -> Tensor:
    """Row by row, by stock transformers in float64. [n]"""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).double().eval()
    found: list[Tensor] = []
    rows = zip(
        *(batch.inputs[k] for k in ("input_ids", "attention_mask")), batch.labels, strict=True
    )
    with torch.no_grad():
        for ids, mask, labels in rows:
            own = ids[mask.bool()][None]
            chances = model(input_ids=own).logits[0].log_softmax(-1)
            wanted = labels[mask.bool()]
            at = [t for t in range(1, len(wanted)) if wanted[t] != -100]
            found.append(torch.stack([chances[t - 1, wanted[t]] for t in at]).sum())
    return torch.stack(found)


def delta_of(engine: Engine) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(3)
    return {
        path: Factors(
            torch.randn(3, d_in, generator=generator), torch.randn(d_out, 3, generator=generator), 0.3
        )
        for path, (d_out, d_in) in engine.base.shapes.modules.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", ["loop", "cohort", "pissa", "hydralora", "dora"])
def test_the_reference_is_the_base_alone_whatever_is_in_it(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    """After training, between two passes, and of an adapter that starts with a part of the base."""
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    batch = data.train.collate(np.arange(7))
    methods: dict[str, Any] = {"hydralora": {"method": name, "heads": 2}}
    given = {} if name in ("loop", "cohort") else methods.get(name, {"method": name})
    lora = LoraSpec.model_validate({"rank": 2, "target_modules": ["q_proj", "v_proj"], **given})
    task = TaskSpec(
        model=model_spec(folder), lora=lora, data=DataSpec(), cohort=1 if name == "loop" else 4
    )
    start = initial_adapter(schema(task.model, lora, 0), lora, 2, seed=1)
    delta: Any = {}
    if name in ("dora", "pissa"):
        start, delta = drawn(task.model, lora, start, 1)
    base = load_base(task.model, lora, 0)
    engine = ENGINES[family_of(lora).name](task, base)
    expected = naive(folder, batch)
    assert torch.allclose(engine.reference(batch).double(), expected, atol=1e-4)
    plan = TrainPlan(
        start, delta=delta, training=LocalTraining(lr=0.05, optimizer="sgd"), site="one"
    )
    (trained,) = engine.train([plan], [[batch] * 6])
    assert trained.metrics["loss"] < np.log(2) - 1e-3
    assert torch.allclose(engine.reference(batch).double(), expected, atol=1e-4)
    before, after = (
        task_of("preference").scores(engine.evaluate(adapter, delta, [batch]))
        for adapter in (start, trained.adapter)
    )
    assert before["margin"] == pytest.approx(0, abs=1e-4)
    assert after["loss"] < np.log(2) and after["margin"] > 1e-2


@pytest.mark.parametrize("kind", [PeftEngine, CohortEngine])
def test_a_shift_of_the_base_is_part_of_the_model_and_none_of_the_reference(
    kind: type[Any], folder_of: Any, tmp_path: Path
) -> None:
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    batch = data.train.collate(np.arange(7))
    base = load_base(model_spec(folder), LORA, 0)
    engine, expected = kind(base, LORA), naive(folder, batch)
    start, delta = initial_adapter(base.shapes, LORA, 2, seed=1), delta_of(engine)
    shifted = task_of("preference").scores(engine.evaluate(start, delta, [batch]))
    assert abs(shifted["margin"]) > 0.05
    assert torch.allclose(engine.reference(batch).double(), expected, atol=1e-4)
    with base.holding(None, delta):
        assert torch.allclose(engine.reference(batch).double(), expected, atol=1e-4)
        weight = base.adapted[next(iter(delta))].weight
        assert isinstance(weight, Tensor)
        kept = weight.clone()
    base.shift({})
    assert not torch.equal(kept, weight), "the shift was lost on the way"


def test_what_trains_is_as_the_plan_says_after_the_reference(
    folder_of: Any, tmp_path: Path
) -> None:
    """peft turns a whole adapter trainable when it is switched on again; A stays frozen here."""
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    base = load_base(model_spec(folder), LORA, 0)
    engine = PeftEngine(base, LORA)
    start = initial_adapter(base.shapes, LORA, 2, seed=1)
    plan = TrainPlan(
        start, train=frozenset({"B"}), training=LocalTraining(lr=0.1, optimizer="sgd"), site="one"
    )
    (trained,) = engine.train([plan], [[data.train.collate(np.arange(5))] * 2])
    before = start.tensors()
    for key, tensor in trained.adapter.tensors().items():
        assert torch.equal(tensor, before[key]) == ("lora_A" in key), key


class Counted:
    """References of rows by their number, and how often each was asked for."""

    def __init__(self, lengths: list[int], budget: int = 1 << 20) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.asked: list[int] = []
        self.found = References(self.compute, budget)

    def compute(self, batch: Batch) -> Tensor:
        rows = batch.labels[::2, 0].tolist()
        self.asked += rows
        return torch.tensor([x for row in rows for x in (-float(row), -row - 0.5)])

    def batch(self, rows: list[int], pool: str = "one") -> Batch:
        def cut(positions: Any) -> Batch:
            numbers = torch.tensor([int(i) for i in positions for _ in range(2)])
            return Batch({}, numbers[:, None], each=2)

        positions = np.array(rows, np.int64)
        return replace(cut(positions), origin=Origin(pool, self.lengths, cut, positions))


def test_references_are_computed_once_for_each_row() -> None:
    own = Counted([1] * 20)
    for rows in ([3, 1], [1, 3], list(range(19, -1, -1)), [5]):
        found = own.found.of(own.batch(rows))
        assert found.tolist() == [x for row in rows for x in (-float(row), -row - 0.5)]
    assert sorted(own.asked) == list(range(20))
    few = Counted([1] * 1000)
    few.found.of(few.batch([500]))
    assert len(few.asked) <= 8, "less than an epoch does not pay for a whole one"


def test_a_row_is_computed_in_the_same_company_whoever_asks_first() -> None:
    groups = []
    for first in ([3], [0, 9], [9, 3, 0]):
        own = Counted([5, 1, 4, 2, 2, 9, 8, 7, 3, 6])
        own.found.of(own.batch(first))
        own.found.of(own.batch([3, 0, 9]))
        groups.append({frozenset(own.asked[:8]), frozenset(own.asked[8:])})
    assert groups[0] == groups[1] == groups[2]


def test_memory_of_references_is_bounded_and_what_is_forgotten_comes_back() -> None:
    one = Counted([1] * 16)
    own = Counted([1] * 16, budget=2 * (16 * 2 * 8 + 2 * 16 * 8))
    for pool in ("a", "b", "c", "a"):
        assert own.found.of(own.batch([2], pool)).tolist() == one.found.of(one.batch([2])).tolist()
        assert len(own.found._pools) <= 2  # pyright: ignore[reportPrivateUsage]
    assert len(own.asked) == 4 * 8


@pytest.mark.parametrize("kind", [PeftEngine, CohortEngine])
def test_epochs_and_evaluations_do_not_compute_it_again(
    kind: type[Any], folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    base = load_base(model_spec(folder), LORA, 0)
    asked: list[int] = []
    name = "_reference" if kind is CohortEngine else "reference"
    found = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, b: asked.append(len(b)) or found(self, b))
    engine = kind(base, LORA)
    rows = np.arange(20)

    def made(epochs: int, seed: int) -> list[Batch]:
        generator = torch_generator(seed, "batches")
        return list(
            batches(data.train, rows, 4, epochs=epochs, generator=generator, pool="rows of one")
        )

    start = initial_adapter(base.shapes, LORA, 2, seed=1)
    plan = TrainPlan(start, training=LocalTraining(lr=0.1, optimizer="sgd"), site="one")
    (once,) = engine.train([plan], [made(3, 0)])
    assert sum(asked) == 20
    engine.train([plan], [made(2, 1)])
    engine.evaluate(start, {}, made(1, 2))
    assert sum(asked) == 20
    # Another process, which met the rows in another order, has the same bits.
    other = kind(load_base(model_spec(folder), LORA, 0), LORA)
    other.evaluate(start, {}, made(1, 5))
    (again,) = other.train([plan], [made(3, 0)])
    for key, tensor in once.adapter.tensors().items():
        assert torch.equal(again.adapter.tensors()[key], tensor), key


# ------------------------------------------------------------------------------------- engines


def test_a_pair_is_one_example_of_dp_sgd(folder_of: Any, tmp_path: Path) -> None:
    """Its gradient is that of its own loss: the sum of what its two rows contribute."""
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    base = load_base(model_spec(folder), LORA, 0)
    engine = PeftEngine(base, LORA)
    start = initial_adapter(base.shapes, LORA, 2, seed=1)
    start = start.replaced({n: t + 0.05 for n, t in start.tensors().items()})
    plan = TrainPlan(start, site="one")
    engine._load(start, plan)  # pyright: ignore[reportPrivateUsage]
    trained = [p for _, p in engine._named() if p.requires_grad]  # pyright: ignore[reportPrivateUsage]
    batch = data.train.collate(np.arange(5))
    assert len(batch) == 5 and batch.labels.shape[0] == 10
    with recording(engine._model):  # pyright: ignore[reportPrivateUsage]
        own = own_gradients(trained, 5, lambda: engine.own_losses(batch), batch.each)
    for row in range(5):
        for p in trained:
            p.grad = None
        engine.mean_loss(data.train.collate(np.array([row]))).backward()
        for p, gradients in zip(trained, own, strict=True):
            assert gradients.shape == (5, *p.shape)
            assert p.grad is not None and float(p.grad.abs().max()) > 1e-5
            assert torch.allclose(gradients[row], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_cohort_is_the_loop_with_upper_layers_dropout_and_checkpointing(
    packed: bool, checkpointing: bool, folder_of: Any, tmp_path: Path
) -> None:
    """What lies below the first adapted block is kept by pair: both rows of it, end to end."""
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    lora = LORA.model_copy(update={"layers": (1,)})
    base = load_base(model_spec(folder), lora, 0)
    rows = np.arange(18)

    def of(k: int) -> list[Batch]:
        generator = torch_generator(k, "batches")
        return list(
            batches(data.train, rows[6 * k : 6 * k + 6 - k], 4, epochs=2, generator=generator,
                    pool=f"rows of {k}")
        )  # fmt: skip

    start = initial_adapter(base.shapes, lora, 2, seed=1)
    start = start.replaced({n: t + 0.05 for n, t in start.tensors().items()})
    training = LocalTraining(lr=0.3, optimizer="sgd", clip_norm=None)
    plans = [TrainPlan(start, training=training, site=f"client-{k}") for k in range(3)]
    cohort = CohortEngine(base, lora, packed=packed, checkpointing=checkpointing)
    together = cohort.train(plans, [of(k) for k in range(3)])
    loop = PeftEngine(base, lora)
    for k, mine in enumerate(together):
        (alone,) = loop.train([plans[k]], [of(k)])
        assert mine.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-4)
        for key, tensor in alone.adapter.tensors().items():
            assert torch.allclose(mine.adapter.tensors()[key], tensor, atol=1e-4), key


@pytest.mark.parametrize("kind", [PeftEngine, CohortEngine])
def test_logits_of_a_vocabulary_are_never_whole(
    kind: type[Any], folder_of: Any, tmp_path: Path
) -> None:
    """Neither in the pass of the reference, nor in training, nor in evaluation."""
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    base = load_base(model_spec(folder), LORA, 0)
    model: Any = base.model
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: widths.append(out.shape[-1]))
    engine, batch = kind(base, LORA), data.train.collate(np.arange(4))
    start = initial_adapter(base.shapes, LORA, 2, seed=1)
    engine.train([TrainPlan(start, site="one")], [[batch]])
    engine.evaluate(start, {}, [batch])
    assert len(widths) == 4 and set(widths) == {model.config.hidden_size}


# ----------------------------------------------------------------------------------------- runs


def table_of(folder: Path, source: str, **more: Any) -> dict[str, Any]:
    return {
        "model": {"source": str(folder), "task": "preference"},
        "lora": {"rank": 2, "target-modules": ["q_proj", "v_proj"]},
        "data": {"source": source, "max-length": 24, "partition": {"kind": "iid"}},
        "fleet": {"clients": 3},
        "rounds": {"count": 6, "per-round": 3, "evaluate-every": 6},
        "training": {"batch-size": 4, "lr": 3e-2, "epochs": 2},
        "engine": {"backend": "inline", "precision": "fp32"},
        **more,
    }


@pytest.mark.parametrize("rule", ["fedavg-lora", "flora"])
def test_a_run_makes_chosen_answers_likelier_than_rejected_ones(
    rule: str, folder_of: Any, tmp_path: Path
) -> None:
    """Also by a rule that merges its updates into the base: the reference stays what it was."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from fedft.api import Run
    from fedft.server.config_file import parse_config
    from fedft.server.run import simulate

    folder = folder_of("preference")
    last = {"chosen": "bloom", "rejected": "drill"}
    rows = [
        {**row, **{key: f"{row[key]} {word}" for key, word in last.items()}}
        for row in rows_of(CASES["preference"], 90)
    ]
    source = written(tmp_path / "rows.jsonl", rows)
    table = table_of(folder, source, strategy={"name": rule})
    run = Run(simulate(parse_config(table), tmp_path / "run").path)
    final = run.metrics["final"]
    assert list(final) == ["loss", "accuracy", "margin"]
    assert final["accuracy"] > 0.8 and final["loss"] < 0.6 and final["margin"] > 0.2
    assert run.metrics["verified"]["rows"] > 0
    run.adapter("last").save_pretrained(tmp_path / "export")
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder), tmp_path / "export"
    ).eval()
    data = data_of("preference", folder, tmp_path, rows)
    batch = data.test.collate(np.arange(len(data.test)))

    def ahead() -> Tensor:
        from fedft.core.tasks import log_likelihoods

        with torch.no_grad():
            found = log_likelihoods(Preference(), model(**batch.inputs).logits, batch.labels)
        return found.view(-1, 2)

    after = ahead()
    with model.disable_adapter():
        before = ahead()
    gains = (after - before).mean(0)
    assert gains[0] > gains[1] + 1.0 and gains[0] > 0


def test_pruned_clients_have_no_whole_base_to_refer_to(folder_of: Any, tmp_path: Path) -> None:
    from fedft.server.config_file import parse_config

    table = table_of(folder_of("preference"), "rows.jsonl", pruning={"selection": "stride"})
    table["fleet"]["model-shares"] = [0.5]
    with pytest.raises(ConfigError, match="preference compares with the whole base"):
        parse_config(table)
    table["model"]["task"] = "causal-lm"
    parse_config(table)


def test_a_plan_counts_both_rows_of_a_pair(folder_of: Any, tmp_path: Path) -> None:
    from fedft.server.config_file import parse_config
    from fedft.server.forecast import forecast

    folder = folder_of("preference")
    rows = rows_of(CASES["preference"], 30)
    source = written(tmp_path / "rows.jsonl", [{**row, "answer": row["chosen"]} for row in rows])
    cost = {}
    for task, size in (("preference", 4), ("causal-lm", 8), ("causal-lm", 4)):
        table = table_of(folder, source)
        table["model"]["task"], table["training"]["batch-size"] = task, size
        found = forecast(parse_config(table))
        cost[task, size] = found["clients"][0]["memory_mib"]["activations"]
        if task == "preference":
            assert json.dumps(found["data"]["notes"]).count("chosen and rejected, texts") == 1
    assert cost["preference", 4] == cost["causal-lm", 8] > cost["causal-lm", 4]


def test_pairs_are_kept_apart_by_their_place(folder_of: Any, tmp_path: Path) -> None:
    """A batch has each pair's two rows below one another, whatever is drawn; one row is enough."""
    data: Data = data_of("preference", folder_of("preference"), tmp_path)
    one = [data.train.collate(np.array([k])) for k in range(4)]
    some = data.train.collate(np.array([2, 0, 3]))
    assert (len(some), some.each, some.labels.shape[0]) == (3, 2, 6)
    for place, k in enumerate((2, 0, 3)):
        for half in range(2):
            row, own = some.labels[2 * place + half], one[k].labels[half]
            assert row[row != -100].tolist() == own[own != -100].tolist()
    assert data.train.lengths[0] == int(one[0].inputs["attention_mask"].sum())


@pytest.mark.parametrize("kind", [PeftEngine, CohortEngine])
def test_a_step_of_several_passes_is_that_of_one(
    kind: type[Any], folder_of: Any, tmp_path: Path
) -> None:
    """Accumulation cuts between pairs, and a part counts by its pairs, not by its tokens."""
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    base = load_base(model_spec(folder), LORA, 0)
    start = initial_adapter(base.shapes, LORA, 2, seed=1)
    start = start.replaced({n: t + 0.05 for n, t in start.tensors().items()})
    batch, found = data.train.collate(np.arange(7)), []
    engine = kind(base, LORA)
    for size, accumulate in ((7, 1), (3, 3)):
        training = LocalTraining(
            batch_size=size, accumulate=accumulate, lr=0.3, optimizer="sgd", clip_norm=None
        )
        plan = TrainPlan(start, training=training, site="one")
        found += engine.train([plan], [[batch] * 2])
    assert found[0].metrics["loss"] == pytest.approx(found[1].metrics["loss"], abs=1e-5)
    for key, tensor in found[0].adapter.tensors().items():
        assert torch.allclose(found[1].adapter.tensors()[key], tensor, atol=1e-5), key


@pytest.mark.parametrize("kind", [PeftEngine, CohortEngine])
def test_noise_on_embeddings_is_not_on_the_reference(
    kind: type[Any], folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the model that trains is disturbed."""
    folder = folder_of("preference")
    data = data_of("preference", folder, tmp_path)
    seen: list[Tensor] = []
    of = References.of

    def looked_at(self: References, batch: Batch) -> Tensor:
        seen.append(of(self, batch))
        return seen[-1]

    monkeypatch.setattr(References, "of", looked_at)
    base = load_base(model_spec(folder), LORA, 0)
    engine, start = kind(base, LORA), initial_adapter(base.shapes, LORA, 2, seed=1)
    training = LocalTraining(lr=1e-6, optimizer="sgd", neftune_alpha=5.0)
    batch = data.train.collate(np.arange(5))
    (trained,) = engine.train([TrainPlan(start, training=training, site="one")], [[batch] * 2])
    assert torch.allclose(seen[0].double(), naive(folder, batch), atol=1e-4)
    assert abs(trained.metrics["loss"] - np.log(2)) > 1e-3
