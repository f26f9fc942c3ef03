"""Rows are put into few sequences, each once, and as they are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedft.core.data.batches import batches
from fedft.core.data.packing import best_fit, packed_batches, packed_count, packed_rows
from fedft.core.errors import MismatchError
from fedft.core.examples import ImageExamples, TokenExamples
from fedft.core.types import IGNORED


def naive(lengths: list[int], capacity: int) -> list[int]:
    """Best fit decreasing, looking at every sequence each time: the tokens of each."""
    full: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, tokens in enumerate(full) if tokens + length <= capacity]
        if fits:
            full[max(fits, key=lambda i: full[i])] += length
        else:
            full.append(length)
    return full


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 30))
@settings(max_examples=200, deadline=None)
def test_best_fit_is_the_naive_one(lengths: list[int], capacity: int) -> None:
    own = np.array(lengths, np.int64)
    bins = best_fit(own, capacity)
    assert sorted(i for rows in bins for i in rows.tolist()) == list(range(len(lengths)))
    assert sorted(int(own[rows].sum()) for rows in bins) == sorted(naive(lengths, capacity))
    assert packed_count(own, capacity, 3) == -(-len(bins) // 3)


def test_best_fit_by_hand() -> None:
    bins = best_fit(np.array([2, 7, 5, 3, 3]), 10)
    assert [rows.tolist() for rows in bins] == [[1, 3], [2, 4, 0]]


def test_best_fit_is_that_of_trl() -> None:
    from datasets import Dataset
    from trl import pack_dataset

    lengths = np.random.default_rng(0).integers(1, 33, 500)
    rows = Dataset.from_dict({"input_ids": [[0] * int(n) for n in lengths]})
    theirs = pack_dataset(rows, 64, "bfd")["seq_lengths"]
    ours = best_fit(lengths, 64)
    assert sorted(map(sorted, theirs)) == sorted(sorted(lengths[r].tolist()) for r in ours)


def test_a_row_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="a row of 11 tokens in a sequence of 10"):
        best_fit(np.array([3, 11]), 10)


def examples(rows: int = 23, answers: bool = False, seed: int = 0) -> TokenExamples:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 90, rng.integers(2, 9)).tolist() for _ in range(rows)]
    if answers:
        return TokenExamples.from_lists(
            ids, 0, answers=[1 + i % (len(row) - 1) for i, row in enumerate(ids)]
        )
    labels = [
        [t if (i + k) % 3 else IGNORED for k, t in enumerate(row)] for i, row in enumerate(ids)
    ]
    return TokenExamples.from_lists(ids, 0, token_labels=labels)


def test_a_sequence_by_hand() -> None:
    data = TokenExamples.from_lists(
        [[5, 6, 7], [8, 9], [3, 4]], 0, token_labels=[[5, IGNORED, 7], [8, 9], [IGNORED, 4]]
    )
    batch = data.packed([np.array([1, 0]), np.array([2])])
    assert batch.inputs["input_ids"].tolist() == [[8, 9, 5, 6, 7], [3, 4, 0, 0, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    none = IGNORED
    assert batch.labels.tolist() == [[none, 9, none, none, 7], [none, 4, none, none, none]]
    assert "attention_mask" not in batch.inputs


@pytest.mark.parametrize("answers", [False, True])
def test_targets_are_those_of_the_rows_apart(answers: bool) -> None:
    data = examples(answers=answers)
    bins = best_fit(data.lengths, 16)
    packed, apart = data.packed(bins), data.collate(np.concatenate(bins))
    wanted = [row[1:][row[1:] != IGNORED].tolist() for row in apart.labels]
    assert packed.labels[packed.labels != IGNORED].tolist() == [t for row in wanted for t in row]
    assert (packed.labels[packed.inputs["position_ids"] == 0] == IGNORED).all()


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_row_once_an_epoch_the_same_by_seed(epochs: int) -> None:
    lengths = examples().lengths

    def drawn(seed: int) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(seed)
        found = packed_rows(lengths, 16, 2, epochs=epochs, generator=generator)
        return [[rows.tolist() for rows in bins] for bins in found]

    assert drawn(1) == drawn(1) != drawn(2)
    assert sorted(i for bins in drawn(1) for rows in bins for i in rows) == sorted(
        [*range(23)] * epochs
    )
    assert len(drawn(1)) == packed_count(lengths, 16, 2, epochs=epochs)
    if epochs > 1:
        each = len(drawn(1)) // epochs
        assert drawn(1)[:each] != drawn(1)[each : 2 * each]


def test_steps_go_over_as_many_epochs_as_they_take() -> None:
    data = examples()
    for steps in (1, 7, 40):
        generator = torch.Generator().manual_seed(0)
        found = list(packed_batches(data, np.arange(23), 16, 2, steps=steps, generator=generator))
        assert len(found) == packed_count(data.lengths, 16, 2, steps=steps) == steps


def test_no_rows_and_one_row() -> None:
    data, generator = examples(), torch.Generator().manual_seed(0)
    none = np.zeros(0, np.int64)
    assert list(packed_batches(data, none, 16, 2, steps=3, generator=generator)) == []
    assert packed_count(none, 16, 2, steps=3) == packed_count(none, 16, 2) == 0
    (one,) = packed_batches(data, np.array([4]), 16, 2, generator=generator)
    assert one.labels.shape == (1, int(data.lengths[4]))


def test_what_has_no_target_by_token_is_refused() -> None:
    classes = TokenExamples.from_lists([[1, 2]], 0, labels=[0])
    with pytest.raises(ValueError, match="not packed"):
        classes.packed([np.array([0])])
    images = ImageExamples([], np.zeros(0, np.int64), lambda _: torch.zeros(1), None)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="packing"):
        list(packed_batches(images, np.zeros(0, np.int64), 16, 2, generator=torch.Generator()))


def test_fewer_padded_tokens_than_batches_of_like_length() -> None:
    """Of rows of one length or of few, packing saves; it never takes more sequences than rows."""
    data, generator = examples(200), torch.Generator().manual_seed(0)
    packed = [
        b.labels.numel() for b in packed_batches(data, np.arange(200), 64, 2, generator=generator)
    ]
    padded = [b.labels.numel() for b in batches(data, np.arange(200), 16, generator=generator)]
    assert sum(packed) < sum(padded)
