"""What a site says of its blocks."""

from pathlib import Path

import pytest
import torch

from fedft.clients.block_similarity import compare
from fedft.clients.engines.cohort import CohortEngine
from fedft.clients.engines.loop import PeftEngine
from fedft.core import similarity
from fedft.core.errors import MismatchError
from fedft.core.models import Base, block_list, load_base
from fedft.core.spec import LoraSpec, ModelSpec
from fedft.core.types import Adapter, Batch, Factors

LORA = LoraSpec(rank=2)


def base_of(folder: Path, *, lean: bool = False) -> Base:
    return load_base(ModelSpec(source=str(folder)), LORA, 3, lean=lean)


def adapter_of(base: Base) -> Adapter:
    g = torch.Generator().manual_seed(0)
    factors = {
        path: Factors(torch.randn(2, n, generator=g), torch.randn(m, 2, generator=g), 0.5)
        for path, (m, n) in base.shapes.modules.items()
    }
    head = {name: torch.randn(s, generator=g) for name, s in base.shapes.head.items()}
    return Adapter(factors, head)


def batches_of(rows: int) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    made: list[Batch] = []
    for first in range(0, rows, 4):
        n = min(4, rows - first)
        ids = torch.randint(2, 25, (n, 6), generator=g)
        mask = (torch.arange(6) < torch.tensor([6, 3, 5, 4])[:n, None]).long()
        labels = torch.randint(0, 3, (n,), generator=g)
        made.append(Batch({"input_ids": ids * mask, "attention_mask": mask}, labels))
    return made


def test_every_engine_and_a_lean_base_say_the_same(tiny_model: Path) -> None:
    resident = [PeftEngine(base_of(tiny_model), LORA), CohortEngine(base_of(tiny_model), LORA)]
    lean = CohortEngine(base_of(tiny_model, lean=True), LORA)
    adapter, own = adapter_of(resident[0].base), batches_of(12)
    answers = [compare(e, adapter, {}, own, "block-influence") for e in (*resident, lean)]
    for other in answers[1:]:
        assert torch.allclose(other.similarity, answers[0].similarity, atol=1e-6)
        assert torch.allclose(other.importance, answers[0].importance, atol=1e-6)
    assert [a.rows for a in answers] == [12] * 3
    held = [not next(b.parameters()).is_meta for b in lean.base.blocks]
    assert held == [False, True]  # no more than one of them was ever there
    # The adapter counts: without it the blocks are others.
    blank = adapter.map_factors({m: Factors(f.A, f.B * 0, 1.0) for m, f in adapter.factors.items()})
    plain = compare(resident[0], blank, {}, own, "block-influence")
    assert not torch.allclose(plain.importance, answers[0].importance, atol=1e-4)


def test_a_comparison_by_hand(tiny_model: Path) -> None:
    """Against transformers' own hidden states, padding left out."""
    engine = CohortEngine(base_of(tiny_model), LORA)
    adapter = adapter_of(engine.base)
    adapter = adapter.map_factors(
        {m: Factors(f.A, f.B * 0, 1.0) for m, f in adapter.factors.items()}
    )
    pooled: list[list[torch.Tensor]] = [[], []]
    influence: list[list[torch.Tensor]] = [[], []]
    for batch in batches_of(8):
        with torch.inference_mode():
            states = engine.base.model(**batch.inputs, output_hidden_states=True).hidden_states
        mask = batch.inputs["attention_mask"].bool()
        for i in range(2):
            for before, after, own in zip(states[i], states[i + 1], mask, strict=True):
                pooled[i].append(after[own].mean(0))
                cosine = torch.nn.functional.cosine_similarity(before[own], after[own], dim=-1)
                influence[i].append(1 - cosine)
    expected = similarity.linear_cka([torch.stack(rows) for rows in pooled])
    found = compare(engine, adapter, {}, batches_of(8), "block-influence")
    assert float(found.similarity) == pytest.approx(float(expected[0, 1]), abs=1e-6)
    means = torch.stack([torch.cat(each).mean() for each in influence])
    assert torch.allclose(found.importance.float(), means, atol=1e-6)


def test_a_block_that_does_nothing_has_no_importance(tiny_model: Path) -> None:
    engine = CohortEngine(base_of(tiny_model), LORA)
    blocks = block_list(engine.base.model)
    assert blocks is not None
    for name, p in blocks[1].named_parameters():
        if ".output." in f".{name}" and "LayerNorm" not in name:
            p.zero_()  # attention and feed-forward add nothing; their norms see normed inputs
    found = {
        kind: compare(engine, adapter_of(engine.base), {}, batches_of(12), kind).importance
        for kind in ("block-influence", "ablation")
    }
    assert found["block-influence"][1] == pytest.approx(0, abs=1e-6)
    assert found["ablation"][1] == pytest.approx(0, abs=1e-5)
    assert abs(float(found["ablation"][0])) > 1e-3
    assert found["block-influence"][0] > 1e-3


def test_too_few_rows_and_ablation_at_a_lean_site_are_refused(tiny_model: Path) -> None:
    engine = CohortEngine(base_of(tiny_model, lean=True), LORA)
    adapter = adapter_of(engine.base)
    with pytest.raises(MismatchError, match="4 rows, and 3"):
        compare(engine, adapter, {}, batches_of(3), "block-influence")
    with pytest.raises(MismatchError, match="ablation needs the whole model"):
        compare(engine, adapter, {}, batches_of(8), "ablation")


def test_what_a_lean_site_loads_for_a_comparison_can_be_trained_on(tiny_model: Path) -> None:
    """It compares in inference mode, and the block that it reached last is the one it holds."""
    engine = CohortEngine(base_of(tiny_model, lean=True), LORA)
    compare(engine, adapter_of(engine.base), {}, batches_of(8), "block-influence")
    with engine.base.holding((1,)):
        held = list(engine.base.blocks[1].parameters())
        assert held and not any(weight.is_inference() for weight in held)
