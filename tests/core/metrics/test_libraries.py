"""Metrics against the libraries that define them, whole and in slices, on ordinary and odd inputs."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn import metrics as sk
from torch import Tensor

from fedft.core.metrics import METRICS, PER_CLASS, Metric, Predictions, Tally

CLOSE = 1e-12


def scored(metric: Metric, found: Predictions) -> Tally:
    columns = {name: [column] for name, column in metric.gather(found).items()}
    items = len(found.targets) if found.texts is None else 2 * len(found.texts)
    return Tally(0.0, items, metric.tally(found), columns)


def of_classes(logits: Tensor, right: Tensor) -> Predictions:
    return Predictions(
        torch.zeros(len(right)), logits.argmax(-1), right, logits.shape[-1], outputs=logits
    )


def classes_case(name: str, classes: int = 4, items: int = 211) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(len(name))
    logits = torch.randn(items, classes, generator=rng, dtype=torch.float64)
    right = torch.randint(classes, (items,), generator=rng)
    match name:
        case "one class":
            right = torch.full_like(right, 2)
        case "constant predictions":
            logits = torch.zeros_like(logits)
            logits[:, 1] = 1
        case "a class that is never right":
            right[right == 3] = 0
        case "a class that is never right nor predicted":
            right[right == 3] = 0
            logits[:, 3] = -50
        case "ties":
            logits = logits.round()
        case "all right":
            logits = torch.nn.functional.one_hot(right, classes).double()
        case "all wrong":
            logits = torch.nn.functional.one_hot((right + 1) % classes, classes).double()
        case "one item":
            logits, right = logits[:1], right[:1]
        case _:
            assert name == "random"
    return logits, right


CASES = (
    *("random", "one class", "constant predictions", "a class that is never right", "ties"),
    *("a class that is never right nor predicted", "all right", "all wrong", "one item"),
)


def oracle(name: str, right: Any, logits: Tensor) -> float:
    """The library's value; NaN where it says that there is none."""
    said, classes = logits.argmax(-1).numpy(), logits.shape[-1]
    labels = list(range(classes))
    f1: Callable[..., Any] = sk.f1_score
    match name:
        case "accuracy":
            return float(sk.accuracy_score(right, said))
        case "balanced-accuracy":
            seen = [k for k in labels if k in right]
            return float(
                sk.recall_score(right, said, labels=seen, average="macro", zero_division=0)
            )
        case "macro-f1" | "micro-f1" | "weighted-f1":
            kind = name.split("-")[0]
            return float(f1(right, said, labels=labels, average=kind, zero_division=0))
        case "mcc":
            return float(sk.matthews_corrcoef(right, said))
    assert name == "auroc"
    if len(set(right)) < 2:
        return float("nan")
    if classes == 2:
        return float(sk.roc_auc_score(right, (logits[:, 1] - logits[:, 0]).numpy()))
    scores = logits.softmax(-1).numpy()
    if set(right) == set(labels):
        return float(sk.roc_auc_score(right, scores, multi_class="ovr", average="macro"))
    seen = [k for k in labels if k in right]
    return float(np.mean([sk.roc_auc_score(right == k, scores[:, k]) for k in seen]))


def in_slices(metric: Metric, parts: Sequence[Predictions]) -> float:
    return metric.value(Tally.total(scored(metric, part) for part in parts))


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "name",
    [
        *("accuracy", "balanced-accuracy", "macro-f1", "micro-f1", "weighted-f1", "mcc", "auroc"),
    ],
)
def test_scores_of_classes_are_those_of_scikit_learn(name: str, case: str, classes: int) -> None:
    logits, right = classes_case(case, 4)
    logits, right = logits[:, :classes], right % classes
    metric, expected = METRICS[name], oracle(name, right.numpy(), logits)
    whole = metric.value(scored(metric, of_classes(logits, right)))
    assert whole == pytest.approx(expected, abs=CLOSE, rel=0, nan_ok=True)
    cuts = [0, 1, 1, 40, 41, len(right)] if len(right) > 41 else [0, 0, len(right)]
    parts = [of_classes(logits[a:b], right[a:b]) for a, b in pairwise(cuts)]
    assert in_slices(metric, parts) == pytest.approx(expected, abs=CLOSE, rel=0, nan_ok=True)


def test_the_oracle_tells_scores_apart() -> None:
    """Unless the libraries' own values differ from each other the comparison would show nothing."""
    logits, right = classes_case("random")
    right[:150] = 0
    names = ("accuracy", "balanced-accuracy", "macro-f1", "weighted-f1", "mcc", "auroc")
    values = [METRICS[n].value(scored(METRICS[n], of_classes(logits, right))) for n in names]
    assert len({round(value, 6) for value in values}) == len(names)


def test_mcc_counts_in_numbers_that_do_not_overflow() -> None:
    big = 3_000_000_000
    tally = Tally(0.0, 2 * big, {"by-class": (big, big, big, big, big, big)})
    assert METRICS["mcc"].value(tally) == pytest.approx(1.0, abs=CLOSE)


def test_scores_that_are_not_finite_have_no_area() -> None:
    logits, right = classes_case("random")
    logits[3, 1] = float("nan")
    assert np.isnan(METRICS["auroc"].value(scored(METRICS["auroc"], of_classes(logits, right))))


@pytest.mark.parametrize("classes", [3, 128, 129])
def test_items_by_class_are_the_confusion_matrix_of_scikit_learn(classes: int) -> None:
    rng = torch.Generator().manual_seed(0)
    right = torch.randint(classes, (900,), generator=rng)
    logits = torch.randn(900, classes, generator=rng)
    logits[torch.arange(900), right] += 1.5
    parts = [of_classes(logits[a : a + 300], right[a : a + 300]) for a in (0, 300, 600)]
    total = Tally.total(scored(PER_CLASS, part) for part in parts)
    counts, said = PER_CLASS.counts(total), logits.argmax(-1).numpy()
    expected = sk.confusion_matrix(right.numpy(), said, labels=list(range(classes)))
    assert (
        (PER_CLASS.matrix(total) == expected.tolist())
        if classes <= 128
        else PER_CLASS.matrix(total) is None
    )
    p, r, f, support = sk.precision_recall_fscore_support(
        right.numpy(), said, labels=list(range(classes)), zero_division=0
    )
    for mine, theirs in ((counts.precision, p), (counts.recall, r), (counts.f1, f)):
        assert np.allclose(mine, theirs, rtol=0, atol=CLOSE)
    assert counts.right.tolist() == list(support)


NUMBERS = {
    "random": lambda rng: (rng.normal(size=90), rng.normal(size=90)),
    "monotone": lambda rng: (np.arange(90.0), np.exp(np.arange(90.0) / 9)),
    "ties": lambda rng: (rng.integers(4, size=90).astype(float), rng.integers(3, size=90) * 1.0),
    "two items": lambda rng: (np.array([1.0, 2.0]), np.array([5.0, 3.0])),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("column", [True, False])
def test_spearman_is_that_of_scipy(case: str, column: bool) -> None:
    right, said = (torch.from_numpy(x) for x in NUMBERS[case](np.random.default_rng(3)))
    metric, expected = METRICS["spearman"], float(spearmanr(right, said).statistic)

    def part(a: int, b: int) -> Predictions:
        outputs = said[a:b, None] if column else said[a:b]
        return Predictions(torch.zeros(b - a), outputs, right[a:b], 1)

    assert metric.value(scored(metric, part(0, len(right)))) == pytest.approx(expected, abs=CLOSE)
    cut = [part(0, 1), part(1, 1), part(1, len(right))]
    assert in_slices(metric, cut) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize(
    ("said", "rho"), [([1.0, 1.0, 1.0], 0.0), ([1.0, float("inf"), 0.0], float("nan"))]
)
def test_a_correlation_with_a_constant_is_none(said: list[float], rho: float) -> None:
    """Where scipy has none: 0, as other correlations here; of what is not finite there is no rank."""
    found = Predictions(torch.zeros(3), torch.tensor(said), torch.tensor([1.0, 2.0, 3.0]), 1)
    value = METRICS["spearman"].value(scored(METRICS["spearman"], found))
    assert value == pytest.approx(rho, nan_ok=True)


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat,",
    "not",
    "(really)",
    "far",
    "from",
    "3.5",
    "dogs!",
    "The",
    "End.",
]


def text_cases() -> dict[str, list[tuple[str, str]]]:
    rng = random.Random(5)

    def line(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    near = [(" ".join([*t.split()[:-1], "x"]), t) for t in (line(9) for _ in range(20))]
    return {
        "near": near,
        "random": [(line(rng.randrange(1, 14)), line(rng.randrange(1, 14))) for _ in range(40)],
        "equal": [(t, t) for t in (line(8) for _ in range(5))],
        "nothing said": [("", line(6)), ("", line(2))],
        "nothing in common": [("uvw xyz uvw xyz", "kkk lll mmm nnn")],
        "short": [("a", "a"), ("b", "ab"), ("abcdefg", "ab")],
        "another script": [("кот сидит на ковре", "кот сидит на полу"), ("猫が座る", "猫が座った")],
        "white space": [("  a  b\tc \n d", "a b c d e")],
        "one": [(line(7), line(7))],
    }


def library_texts(name: str, pairs: list[tuple[str, str]]) -> float:
    said, wanted = [a for a, _ in pairs], [b for _, b in pairs]
    if name == "bleu":
        from sacrebleu import corpus_bleu

        return float(corpus_bleu(said, [wanted], force=True).score)
    if name == "chrf":
        from sacrebleu import corpus_chrf

        return float(corpus_chrf(said, [wanted]).score)
    from rouge_score.rouge_scorer import RougeScorer

    kind = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}[name]
    scorer = RougeScorer([kind])
    return float(np.mean([scorer.score(b, a)[kind].fmeasure for a, b in pairs]))


@pytest.mark.parametrize("case", text_cases())
@pytest.mark.parametrize("name", ["rouge-1", "rouge-2", "rouge-l", "bleu", "chrf"])
def test_scores_of_texts_are_those_of_their_libraries(name: str, case: str) -> None:
    pairs, metric = text_cases()[case], METRICS[name]

    def part(texts: list[tuple[str, str]]) -> Predictions:
        nothing = torch.zeros(0)
        return Predictions(nothing, nothing, nothing, 0, texts=texts)

    expected = library_texts(name, pairs)
    assert metric.value(scored(metric, part(pairs))) == pytest.approx(
        expected, abs=CLOSE, rel=CLOSE
    )
    cut = [part([]), part(pairs[:1]), part(pairs[1:])]
    assert in_slices(metric, cut) == pytest.approx(expected, abs=CLOSE, rel=CLOSE)


def test_no_text_at_all_has_no_rouge_and_no_bleu() -> None:
    nothing = torch.zeros(0)
    empty = Predictions(nothing, nothing, nothing, 0, texts=[])
    for name in ("rouge-1", "rouge-2", "rouge-l"):
        assert np.isnan(METRICS[name].value(scored(METRICS[name], empty)))
    for name in ("bleu", "chrf"):
        assert METRICS[name].value(scored(METRICS[name], empty)) == 0.0
