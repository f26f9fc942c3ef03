"""Batches: every row once, masks right, one order per generator, little padding."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedft.core.data.batches import WINDOW, batch_count, batch_rows, batches, eval_batches
from fedft.core.examples import IGNORED, ImageExamples, TokenExamples

PAD = 999

rows_of_tokens = st.lists(
    st.lists(st.integers(1, 500), min_size=1, max_size=12), min_size=1, max_size=60
)


def classified(ids: list[list[int]]) -> TokenExamples:
    """The class of a row is its number, so that a batch tells which rows it has."""
    return TokenExamples.from_lists(ids, PAD, labels=range(len(ids)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(rows_of_tokens, st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_every_row_once_an_epoch(ids: list[list[int]], size: int, epochs: int, seed: int) -> None:
    examples = classified(ids)
    got = list(
        batches(examples, np.arange(len(ids)), size, epochs=epochs, generator=generator(seed))
    )
    per_epoch = -(-len(ids) // size)
    assert len(got) == per_epoch * epochs == batch_count(len(ids), size, epochs=epochs)
    for epoch in range(epochs):
        cut = got[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for b in cut for i in b.labels.tolist()) == list(range(len(ids)))
        assert sum(len(b) < size for b in cut) <= 1


@given(rows_of_tokens, st.integers(1, 9))
def test_collation_agrees_with_a_loop_over_rows(ids: list[list[int]], size: int) -> None:
    examples = classified(ids)
    for batch in batches(examples, np.arange(len(ids)), size, generator=generator()):
        tokens, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        own = [ids[i] for i in batch.labels.tolist()]
        longest = max(map(len, own))
        assert tokens.tolist() == [row + [PAD] * (longest - len(row)) for row in own]
        assert mask.tolist() == [[1] * len(row) + [0] * (longest - len(row)) for row in own]
        assert {t.dtype for t in (tokens, mask, batch.labels)} == {torch.int64}


@given(rows_of_tokens, st.data())
def test_loss_falls_on_the_answer_alone(ids: list[list[int]], data: st.DataObject) -> None:
    starts = [data.draw(st.integers(0, len(row) - 1)) for row in ids]
    examples = TokenExamples.from_lists(ids, PAD, answers=starts)
    batch = examples.collate(np.arange(len(ids)))
    for row, (tokens, start) in enumerate(zip(ids, starts, strict=True)):
        padding = batch.labels.shape[1] - len(tokens)
        want = [IGNORED] * start + tokens[start:] + [IGNORED] * padding
        assert batch.labels[row].tolist() == want


@given(npst.arrays(np.int64, st.integers(0, 80), elements=st.integers(1, 30)), st.integers(1, 9))
def test_same_generator_same_batches(lengths: np.ndarray, size: int) -> None:
    def order(seed: int) -> list[list[int]]:
        rows = batch_rows(lengths, size, epochs=2, generator=generator(seed))
        return [chosen.tolist() for chosen in rows]

    assert order(3) == order(3)


def test_another_generator_and_another_epoch_give_another_order() -> None:
    lengths = np.arange(1, 65)
    drawn = [c.tolist() for c in batch_rows(lengths, 4, epochs=2, generator=generator(0))]
    assert drawn[:16] != drawn[16:]
    assert {frozenset(c) for c in drawn[:16]} != {frozenset(c) for c in drawn[16:]}
    other = [c.tolist() for c in batch_rows(lengths, 4, epochs=2, generator=generator(1))]
    assert drawn != other


@given(
    npst.arrays(np.int64, st.integers(1, 4 * WINDOW), elements=st.integers(1, 30)),
    st.integers(0, 9),
)
def test_padding_is_the_least_possible_within_a_window(lengths: np.ndarray, seed: int) -> None:
    """One window: no division into batches of these sizes pads less than the sorted one."""
    got = [lengths[c] for c in batch_rows(lengths, 4, generator=generator(seed))]
    padded = sum(int(b.max()) * len(b) for b in got)
    ordered = np.sort(lengths)
    assert padded == sum(
        int(ordered[i : i + 4].max()) * len(ordered[i : i + 4]) for i in range(0, len(ordered), 4)
    )


def test_bucketing_halves_the_padding_of_real_lengths() -> None:
    """Lengths as of the WordNet definitions: mean 15, skewed. A site of 64 rows, batch 8."""
    rng = np.random.default_rng(0)
    lengths = 4 + rng.gamma(2.5, 4.5, 64).astype(np.int64)

    def padding(order: list[np.ndarray]) -> int:
        return sum(int(lengths[c].max()) * len(c) - int(lengths[c].sum()) for c in order)

    epochs = 20
    bucketed = padding(list(batch_rows(lengths, 8, epochs=epochs, generator=generator())))
    plain = padding([c for _ in range(epochs) for c in np.split(rng.permutation(64), 8)])
    assert bucketed < 0.5 * plain


@pytest.mark.parametrize("steps", [1, 3, 7, 25])
def test_steps_cycle_through_epochs(steps: int) -> None:
    examples = classified([[1]] * 10)
    got = list(batches(examples, np.arange(10), 4, epochs=1, steps=steps, generator=generator()))
    assert len(got) == steps == batch_count(10, 4, steps=steps)
    for first in range(0, steps - 2, 3):
        seen = [i for b in got[first : first + 3] for i in b.labels.tolist()]
        assert sorted(seen) == list(range(10))


def test_steps_begin_like_epochs() -> None:
    """The order does not depend on how its end is stated."""
    lengths = np.arange(1, 20)
    by_epochs = list(batch_rows(lengths, 4, epochs=2, generator=generator()))
    by_steps = list(batch_rows(lengths, 4, steps=7, generator=generator()))
    assert [c.tolist() for c in by_steps] == [c.tolist() for c in by_epochs[:7]]


@pytest.mark.parametrize("steps", [None, 5])
def test_a_site_without_rows_has_no_batches(steps: int | None) -> None:
    examples, none = classified([[1]]), np.arange(0)
    assert not list(batches(examples, none, 4, steps=steps, generator=generator()))
    assert not list(eval_batches(examples, none, 4))
    assert batch_count(0, 4, steps=steps) == 0


def test_only_the_sites_own_rows() -> None:
    examples = classified([[i] for i in range(20)])
    got = list(batches(examples, np.array([3, 17, 5], np.int32), 2, generator=generator()))
    assert sorted(i for b in got for i in b.labels.tolist()) == [3, 5, 17]


def test_a_row_that_is_held_twice_comes_twice() -> None:
    examples = classified([[1], [2]])
    (batch,) = batches(examples, np.array([1, 1]), 4, generator=generator())
    assert batch.labels.tolist() == [1, 1]


@given(rows_of_tokens, st.integers(1, 9))
def test_evaluation_sorts_and_repeats_itself(ids: list[list[int]], size: int) -> None:
    examples, rows = classified(ids), np.arange(len(ids))
    got = list(eval_batches(examples, rows, size))
    assert sorted(i for b in got for i in b.labels.tolist()) == rows.tolist()
    widths = [b.inputs["input_ids"].shape[1] for b in got]
    assert all(a <= b for a, b in pairwise(widths))
    again = list(eval_batches(examples, rows, size))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(got, again, strict=True))


@given(rows_of_tokens, st.data())
def test_subset_keeps_rows_whole(ids: list[list[int]], data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=20)), np.int64)
    part = classified(ids).subset(rows)
    assert len(part) == len(rows)
    assert part.lengths.tolist() == [len(ids[i]) for i in rows]
    assert [part.ids[a:b].tolist() for a, b in pairwise(part.offsets.tolist())] == [
        ids[i] for i in rows
    ]
    assert part.labels is not None and part.labels.tolist() == rows.tolist()


def test_fingerprint_tells_examples_apart() -> None:
    whole = classified([[1, 2], [3]])
    assert whole.fingerprint() == classified([[1, 2], [3]]).fingerprint()
    others = [
        classified([[1], [2, 3]]),
        classified([[1, 2], [4]]),
        TokenExamples.from_lists([[1, 2], [3]], PAD, labels=[1, 0]),
        TokenExamples.from_lists([[1, 2], [3]], PAD, answers=[0, 1]),
    ]
    assert len({e.fingerprint() for e in [whole, *others]}) == 5


def test_examples_that_do_not_fit_together_are_refused() -> None:
    ids, offsets = np.array([1, 2], np.int32), np.array([0, 1, 2])
    with pytest.raises(ValueError, match="do not fit"):
        TokenExamples(ids, offsets, PAD, labels=np.array([0]))
    with pytest.raises(ValueError, match="give one of"):
        TokenExamples(ids, offsets, PAD)


def test_images_are_stacked(tmp_path) -> None:
    def transform(image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    pixels = [[[i, i], [i, 200]] for i in range(5)]
    examples = ImageExamples(pixels, np.arange(5), transform, tmp_path)
    (batch,) = batches(examples, np.array([4, 2]), 8, generator=generator())
    assert batch.inputs["pixel_values"].shape == (2, 3, 2, 2)
    assert batch.inputs["pixel_values"][:, 0, 0, 0].tolist() == batch.labels.tolist()
    assert examples.subset(np.array([4])).collate(np.array([0])).labels.tolist() == [4]
