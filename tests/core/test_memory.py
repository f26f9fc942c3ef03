"""The memory model, by hand; benchmarks/memory.py holds it against what processes take."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from fedft.core.memory import MIB, Geometry, Load, Peak, footprint, framework_bytes
from fedft.core.tables import WINDOW

D, F, V = 8, 32, 1000
GEOMETRY = Geometry(
    blocks=3,
    hidden=D,
    intermediate=F,
    heads=2,
    key_value=D,
    gated=False,
    block_parameters=100,
    other_parameters=V * D + 50,
    in_file={"fp32": V * D, "bf16": 0},
)
LOAD = Load(batch=2, tokens=5, scored=4, trainable=7, trainable_per_block=11)
KEPT, WIDEST = 7 * D + F, D + 2 * F  # numbers a token


def test_blocks_add_up() -> None:
    found = footprint(GEOMETRY, LOAD, "fp32")
    for blocks in range(4):
        parts = found.of(blocks)
        assert parts["base"] == 4 * (50 + 100 * blocks)
        assert parts["adapter"] == 20 * (7 + 11 * blocks)
        assert parts["activations"] == 4 * 10 * (WIDEST + KEPT * blocks)
    assert found.of() == found.of(3)


def test_a_table_counts_where_the_file_has_it_in_another_precision() -> None:
    fp32, bf16 = (footprint(GEOMETRY, LOAD, p).of(0)["base"] for p in ("fp32", "bf16"))
    assert (fp32, bf16) == (4 * 50, 2 * (V * D + 50))


def test_with_checkpointing_one_block_is_kept_at_a_time() -> None:
    found = footprint(GEOMETRY, replace(LOAD, checkpointing=True), "fp32")
    for blocks in range(1, 4):
        assert found.of(blocks)["activations"] == 4 * 10 * (WIDEST + KEPT + D * blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_count_in_full_only_where_the_model_makes_them(checkpointing: bool) -> None:
    causal = replace(GEOMETRY, vocabulary=V)
    load = replace(LOAD, checkpointing=checkpointing)
    silent, whole, sliced = (
        footprint(geometry, load, "fp32").of(2)["activations"]
        for geometry in (GEOMETRY, causal, replace(causal, sliced=True))
    )
    assert whole - silent == 3 * 4 * V * 8
    inside = 4 * 10 * (WIDEST + KEPT * checkpointing)
    assert sliced - silent == 2 * WINDOW + 16 * D * 8 - inside  # never both at once


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's process status")
def test_a_peak_is_what_was_taken_on_top_and_given_back() -> None:
    before = framework_bytes()
    assert before is not None
    assert before > 50 * MIB  # torch alone takes more
    peak = Peak()
    block = np.ones(40 * MIB, dtype=np.uint8)
    del block
    assert 38 * MIB < peak.bytes() < 60 * MIB  # the kernel counts pages in batches
    assert Peak().bytes() < 20 * MIB
    assert framework_bytes() == before
