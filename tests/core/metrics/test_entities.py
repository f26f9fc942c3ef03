"""Entities of tagged words: by hand, and as seqeval counts them."""

import random
import warnings
from collections.abc import Sequence

import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score

from fedft.core.metrics import METRICS, Predictions, Tally

Tags = Sequence[Sequence[str]]
ENTITIES = {
    "entity-f1": f1_score,
    "entity-precision": precision_score,
    "entity-recall": recall_score,
}


def tally(right: Tags, predicted: Tags, names: Sequence[str]) -> Tally:
    ids = {name: i for i, name in enumerate(names)}

    def flat(rows: Tags) -> torch.Tensor:
        return torch.tensor([ids[tag] for row in rows for tag in row])

    of = torch.tensor([i for i, row in enumerate(right) for _ in row])
    found = Predictions(
        torch.zeros(len(of)), flat(predicted), flat(right), len(names), rows=of, names=names
    )
    return Tally(0.0, len(of), METRICS["entity-f1"].tally(found))


def counts(right: Tags, predicted: Tags) -> object:
    names = sorted({tag for row in (*right, *predicted) for tag in row})
    return tally(right, predicted, names).sums["entities"]


def test_by_hand() -> None:
    """(right, predicted, to be found)."""
    right = ["B-PER", "I-PER", "O", "B-LOC"]
    assert counts([right], [right]) == (2, 2, 2)
    assert counts([right], [["B-PER", "O", "O", "B-LOC"]]) == (1, 2, 2), "one word short"
    assert counts([right], [["B-PER", "I-PER", "I-PER", "B-LOC"]]) == (1, 2, 2), "one too many"
    assert counts([right], [["B-LOC", "I-LOC", "O", "B-LOC"]]) == (1, 2, 2), "another type"
    assert counts([right], [["O", "O", "O", "O"]]) == (0, 0, 2)
    assert counts([["O", "O"]], [["O", "B-X"]]) == (0, 1, 0)


def test_badly_formed_sequences_are_read_as_conll_reads_them() -> None:
    formed = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert counts(formed, [["I-PER", "I-PER", "O", "I-LOC"]]) == (2, 2, 2), "no beginning"
    assert counts([["B-A", "B-B", "O"]], [["B-A", "I-B", "O"]]) == (2, 2, 2), "another type goes on"
    assert counts([["B-A", "B-A"]], [["B-A", "I-A"]]) == (0, 1, 2)


def test_an_entity_ends_with_its_row() -> None:
    two = [["O", "B-A"], ["I-A", "O"]]
    assert counts(two, two) == (2, 2, 2)
    assert counts([["O", "B-A", "I-A", "O"]], [["O", "B-A", "I-A", "O"]]) == (1, 1, 1)


def test_words_are_entities_where_no_tag_begins_one() -> None:
    """Parts of speech: every word counts for itself, and O for nothing."""
    right, predicted = [["NOUN", "NOUN", "VERB"]], [["NOUN", "VERB", "VERB"]]
    assert counts(right, predicted) == (2, 3, 3)
    assert counts([["PER", "PER", "O"]], [["PER", "O", "O"]]) == (1, 1, 2)


def random_rows(rng: random.Random) -> tuple[list[list[str]], list[list[str]], list[str]]:
    kinds = rng.sample(["PER", "LOC", "ORG", "MISC-X", "é"], rng.randint(1, 4))
    letters = rng.choice(["BI", "BIES", "I", "B"])
    names = ["O", *(f"{letter}-{kind}" for kind in kinds for letter in letters)]
    names += ["B", "I"] if rng.random() < 0.2 else []
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
    right = [[rng.choice(names) for _ in range(n)] for n in lengths]
    predicted = [[t if rng.random() < 0.6 else rng.choice(names) for t in row] for row in right]
    return right, predicted, names


@pytest.mark.parametrize("seed", range(4))
def test_as_seqeval_in_slices_and_whole(seed: int) -> None:
    rng = random.Random(seed)
    seen = set[float]()
    for _ in range(60):
        right, predicted, names = random_rows(rng)
        cuts = [slice(i, i + 2) for i in range(0, len(right), 2)]
        total = Tally.total(tally(right[cut], predicted[cut], names) for cut in cuts)
        assert total == tally(right, predicted, names)
        for name, theirs in ENTITIES.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is no usual tag is remarked on
                expected = float(theirs(right, predicted, zero_division=0))
            value = METRICS[name].value(total)
            assert abs(value - expected) <= 1e-12, (name, right, predicted)
            seen.add(value)
    assert len(seen) > 50, "almost all values are alike: anything would agree"


def test_nothing_to_find_is_no_division_by_zero() -> None:
    nothing = tally([["O", "O"]], [["O", "O"]], ["O", "B-A"])
    assert [METRICS[name].value(nothing) for name in ENTITIES] == [0.0] * 3


def test_names_are_needed() -> None:
    with pytest.raises(ValueError, match="entity-f1: 0 names for 3 classes"):
        METRICS["entity-f1"].tally(
            Predictions(torch.zeros(2), torch.tensor([0, 1]), torch.tensor([0, 1]), 3)
        )
