"""What is kept of the blocks below the first adapted one, on tiny models with random weights."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedft.clients.engines.checkpointing import first_adapted
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core import seeds
from fedft.core.data.batches import batches, eval_batches
from fedft.core.examples import Examples, ImageExamples, TokenExamples
from fedft.core.models import Base
from fedft.core.spec import LoraSpec
from fedft.core.types import Batch, LocalTraining, TrainPlan
from tests.clients.test_cohort import (
    CLASSES,
    MODELS,
    PAD,
    VOCABULARY,
    difference,
    make_adapter,
    make_base,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

KINDS = ("bert", "roberta", "llama", "llama-score", "gpt2", "dinov2")


def upper_base(kind: str, dtype: torch.dtype = torch.float64) -> Base:
    """A base of two blocks, of which the upper one is adapted."""
    _, task, names = MODELS[kind]
    return Base(make_base(kind, dtype).model, LoraSpec(target_modules=names, layers=(1,)), task)


def make_examples(kind: str, rows: int = 40, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=rows)
    if kind == "dinov2":
        images = [rng.integers(256, size=(8, 8, 3)).tolist() for _ in range(rows)]
        return ImageExamples(images, labels, _pixels, folder=None)  # type: ignore[arg-type]
    ids = [rng.permutation(VOCABULARY - 2)[: rng.integers(3, 30)] + 2 for _ in range(rows)]
    if MODELS[kind][1] == "causal-lm":
        return TokenExamples.from_lists(ids, PAD, answers=[1] * rows)
    return TokenExamples.from_lists(ids, PAD, labels=labels)


def _pixels(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 128 - 1


def site_batches(examples: Examples, site: int, rows: int, round_: int, **how: Any) -> list[Batch]:
    return list(
        batches(
            examples,
            np.arange(rows) * 3 % len(examples) + site % 3,
            how.pop("size", 4),
            generator=seeds.torch_generator(0, "batches", round_, str(site)),
            pool=how.pop("pool", f"client {site}"),
            **how,
        )
    )


def plans_of(base: Base, sites: int, **changes: Any) -> list[TrainPlan]:
    plan = TrainPlan(make_adapter(base, 2, 0, 2.0), training=LocalTraining(lr=5e-3))
    return [
        replace(plan, start=make_adapter(base, 2 + k % 2, k, 2.0), site=f"client {k}", **changes)
        for k in range(sites)
    ]


class Runs:
    """Counts how often the first block of a model really runs."""

    def __init__(self, base: Base) -> None:
        self.count = 0
        inner = next(m for path, m in base.model.named_modules() if path.endswith(".0.norm1"))
        inner.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


# ------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_activations_equal_the_plain_loop(kind: str, packed: bool) -> None:
    examples = make_examples(kind)
    oracle = PeftEngine(upper_base(kind), LoraSpec())
    engine = CohortEngine(upper_base(kind), LoraSpec(), packed=packed)
    plans = plans_of(engine.base, 3)
    for round_ in range(2):
        own = [site_batches(examples, k, (7, 9, 5)[k], round_, epochs=2) for k in range(3)]
        for expected, actual in zip(
            oracle.train(plans, own), engine.train(plans, own), strict=True
        ):
            assert difference(expected, actual) <= 1e-10
    assert len(engine._prefix._kept) == 3


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from([0, 5_000, 10**9]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_mix_equals_running_all_blocks(
    sites: list[tuple[int, int]], epochs: int, budget: int
) -> None:
    examples = make_examples("bert")
    engine = CohortEngine(upper_base("bert"), LoraSpec(dropout=0.2))
    engine._prefix._left = engine._prefix._budget = budget
    plans = plans_of(engine.base, len(sites))
    known, unknown = (
        [
            site_batches(
                examples, k, rows, 0, size=size, epochs=epochs, pool=pool and f"client {k}"
            )
            for k, (rows, size) in enumerate(sites)
        ]
        for pool in ("known", None)
    )
    for expected, actual in zip(
        engine.train(plans, unknown), engine.train(plans, known), strict=True
    ):
        assert difference(expected, actual) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_gives_the_same_bits(kind: str) -> None:
    """Whether a pool was still kept differs between workers; the record of a run must not."""
    examples = make_examples(kind, rows=150)
    engine = CohortEngine(upper_base(kind, torch.float32), LoraSpec())
    adapter = make_adapter(engine.base, 3, 0, 2.0)
    rows = np.arange(len(examples))[1::2]
    unknown = engine.evaluate(adapter, {}, eval_batches(examples, rows))
    assert not engine._prefix._kept
    for _ in range(2):
        known = engine.evaluate(adapter, {}, eval_batches(examples, rows, pool="test"))
        assert known == unknown
    assert list(engine._prefix._kept) == ["test"]


def test_a_shifted_base_keeps_what_is_below() -> None:
    examples = make_examples("bert")
    oracle = PeftEngine(upper_base("bert"), LoraSpec())
    engine = CohortEngine(upper_base("bert"), LoraSpec())
    delta = dict(make_adapter(engine.base, 2, 7, 0.5).factors)
    for plans in (plans_of(engine.base, 2), plans_of(engine.base, 2, delta=delta)):
        own = [site_batches(examples, k, 6, 0) for k in range(2)]
        for expected, actual in zip(
            oracle.train(plans, own), engine.train(plans, own), strict=True
        ):
            assert difference(expected, actual) <= 1e-10


def test_what_is_kept_does_not_depend_on_who_came_first() -> None:
    examples = make_examples("bert")
    results = []
    for budget in (10**9, 0):
        for order in ([0], [1, 0], [1]):
            engine = CohortEngine(upper_base("bert", torch.float32), LoraSpec())
            engine._prefix._left = budget
            for k in order:
                engine.train([plans_of(engine.base, 2)[k]], [site_batches(examples, k, 9, 3)])
            plans = plans_of(engine.base, 2)
            results.append(engine.train(plans, [site_batches(examples, k, 9, 4) for k in range(2)]))
    for again in results[1:]:
        assert [difference(x, y) for x, y in zip(results[0], again, strict=True)] == [0, 0]


# ------------------------------------------------------------------------------ when it is used


def test_a_block_below_runs_once_for_each_row() -> None:
    examples = make_examples("dinov2")
    engine = CohortEngine(upper_base("dinov2"), LoraSpec())
    runs, plans = Runs(engine.base), plans_of(engine.base, 2)
    own = [site_batches(examples, k, 6, 0, epochs=3) for k in range(2)]
    engine.train(plans, own)
    assert runs.count == 1 + 2  # one row to learn the form, and a chunk of each site
    engine.train(plans, own)
    engine.evaluate(plans[0].start, {}, eval_batches(examples, np.arange(6), pool="test"))
    engine.evaluate(plans[0].start, {}, eval_batches(examples, np.arange(6), pool="test"))
    assert runs.count == 3 + 1


def test_kept_images_are_not_opened_again() -> None:
    opened: list[object] = []

    def transform(image: Any) -> torch.Tensor:
        opened.append(image)
        return _pixels(image)

    examples = replace(make_examples("dinov2"), transform=transform)  # type: ignore[call-arg]
    engine = CohortEngine(upper_base("dinov2"), LoraSpec())
    own = [site_batches(examples, 0, 6, 0, epochs=3)]
    engine.train(plans_of(engine.base, 1), own)
    first = len(opened)
    engine.train(plans_of(engine.base, 1), own)
    assert 6 <= first <= 8
    assert len(opened) == first


@pytest.mark.parametrize(
    ("how", "budget"), [({"steps": 1}, 10**9), ({"pool": None}, 10**9), ({}, 100)]
)
def test_blocks_run_where_keeping_would_not_pay(how: dict[str, Any], budget: int) -> None:
    examples = make_examples("dinov2")
    engine = CohortEngine(upper_base("dinov2"), LoraSpec())
    engine._prefix._left = engine._prefix._budget = budget
    runs = Runs(engine.base)
    own = [site_batches(examples, 0, 6, 0, **how)]
    engine.train(plans_of(engine.base, 1), own)
    assert not engine._prefix._kept
    assert runs.count >= len(own[0])


def test_adapters_in_the_first_block_leave_nothing_to_keep() -> None:
    assert first_adapted(make_base("bert")) == 0
    assert first_adapted(upper_base("bert")) == 1
