"""The keys of lines: what runs write is declared, what is declared is written and documented."""

import json
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from fedft.core.meters import readings
from fedft.core.record import figures, lines
from fedft.core.record.fitting import declared, fitted, hints_of, misfits, required_of
from fedft.core.record.lines import (
    ClientLine,
    Figures,
    Release,
    RoundLine,
    Summary,
    with_figures,
    with_reported,
)
from fedft.server.config_file import parse_config
from fedft.server.run import simulate

Table = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]

RUNS: dict[str, dict[str, Any]] = {
    "plain": {
        "data": {"holdout": 0.3},
        "fleet": {"speeds": [1.0, 20.0]},
        "rounds": {"count": 1, "spectrum": True, "per-round": 3, "spares": 2},
        "evaluation": {"before": True, "per-class": True},
    },
    "asynchronous": {
        "fleet": {"speeds": [1.0, 20.0]},
        "rounds": {"count": 2, "per-round": 4},
        "strategy": {"name": "fedbuff", "size": 2},
    },
    "pruned": {
        "lora": {"rank": 4, "alpha": 8, "target-modules": "all-linear"},
        "fleet": {"model-shares": [0.5, 1.0]},
        "pruning": {"selection": "cka", "every": 2},
        "rounds": {"count": 2},
    },
    "private": {
        "strategy": {"name": "central-dp", "noise-multiplier": 0.8, "clip": 0.5},
        "training": {"steps": 1, "dp": {"noise-multiplier": 1.0, "max-grad-norm": 1.0}},
        "rounds": {"count": 2, "per-round": 4},
    },
    "mixture": {
        "lora": {"rank": 4, "alpha": 8, "method": "hydralora", "heads": 2},
        "strategy": {"name": "hydralora", "mode": "global"},
        "rounds": {"count": 1},
    },
}
KINDS: dict[str, type[Any]] = {
    "rounds.jsonl": RoundLine,
    "clients.jsonl": ClientLine,
    "privacy.jsonl": Release,
}
ELSEWHERE = {
    "perplexity",  # of language models
    "precision_bits",  # of real clients
    "code",  # of an error reply
    *("meters", "meter_errors"),
}
"""Declared keys that none of these runs has a reason to write."""

written: dict[type[Any], set[str]] = {kind: set() for kind in (*KINDS.values(), Summary)}


@pytest.mark.parametrize("name", RUNS)
def test_every_key_that_a_run_writes_is_declared(
    name: str, tiny_table: Table, tmp_path: Path
) -> None:
    """Deep: the parts of a line, too, and their types."""
    run = simulate(parse_config(tiny_table(**RUNS[name])), tmp_path / "run")
    for file, kind in KINDS.items():
        path = run.path / file
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            assert list(misfits(kind, line)) == []
            written[kind] |= line.keys()
    summary = json.loads((run.path / "summary.json").read_text())
    assert list(misfits(Summary, summary)) == []
    written[Summary] |= summary.keys()


def test_every_declared_key_is_written() -> None:
    """By one of the runs above; a key that nobody writes any more is to be taken out."""
    if not all(written.values()):
        pytest.skip("the runs above were not all run in this process")
    for kind, keys in written.items():
        assert hints_of(kind).keys() - keys <= ELSEWHERE, kind


TYPES: dict[str, type[Any]] = {
    name: one
    for module in (figures, lines, readings)
    for name, one in vars(module).items()
    if hasattr(one, "__required_keys__")
}
WORD = re.compile(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)


def said(kind: type[Any]) -> dict[str, str]:
    """Key → its words, in the class or in one that it is made of."""
    hints, found = hints_of(kind), dict[str, str]()
    for part in TYPES.values():
        if hints_of(part).items() <= hints.items():
            found |= {key: " ".join(words.split()) for key, words in WORD.findall(part.__doc__)}
    return {key: found.get(key, "") for key in hints}


def test_every_key_has_its_words() -> None:
    for name, kind in TYPES.items():
        assert all(said(kind).values()), f"{name}: {said(kind)}"


def every_key() -> str:
    """The reference in docs/run-directory.md."""
    whole = {"RoundLine": "rounds.jsonl", "ClientLine": "clients.jsonl", "Release": "privacy.jsonl"}
    whole["Summary"] = "summary.json"
    parts = (
        "Facts",
        "Figures",
        "Accounts",
        "Evaluated",
        "Timed",
        "Reported",
        "LayerBias",
        "Meters",
    )
    text = ""
    for name in [*whole, *sorted(TYPES.keys() - whole.keys() - set(parts))]:
        kind = TYPES[name]
        always = required_of(kind)
        text += f"\n### {whole.get(name, name)}\n{kind.__doc__.strip().splitlines()[0]}\n\n"
        for key, words in said(kind).items():
            of = hints_of(kind)[key]
            inner = [n for n, t in TYPES.items() if t in (of, *getattr(of, "__args__", ()))]
            more = f" → {inner[0]}" if inner else ""
            line = f"* `{key}`{more}{'' if key in always else ' (not always)'}: {words}"
            text += "\n  ".join(textwrap.wrap(line, 116, break_on_hyphens=False)) + "\n"
    return text


def test_the_page_has_every_key() -> None:
    page = (ROOT / "docs" / "run-directory.md").read_text(encoding="utf-8")
    assert every_key().strip() in page, "python -m tests.core.test_lines prints what belongs there"


# ── a wrong key is found ──────────────────────────────────────────────────────────────────────

SNIPPETS = {
    'line["bytes"]["up"]': True,
    'line["byte"]': False,
    'line["bytes"]["upp"]': False,
    'line["eval"]': False,  # not in every line
    '"eval" in line and line["eval"]["loss"]': True,
    'reply["staus"]': False,
    'reply["round"]': True,
    'summary["adapter_sha"]': False,
    'release["sites"]': False,
}


@pytest.mark.slow
def test_the_type_checker_finds_a_wrong_key(tmp_path: Path) -> None:
    """Each right one passes, each wrong one is an error on its own line."""
    head = (
        "from fedft.core.record.lines import ClientLine, Release, RoundLine, Summary\n"
        "def f(line: RoundLine, reply: ClientLine, summary: Summary, release: Release):\n"
    )
    (tmp_path / "snippet.py").write_text(head + "".join(f"    _ = {text}\n" for text in SNIPPETS))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, str(tmp_path / "snippet.py")], capture_output=True, text=True, cwd=ROOT
    )
    errors = {
        one["range"]["start"]["line"] - 2
        for one in json.loads(done.stdout)["generalDiagnostics"]
        if one["severity"] == "error"
    }
    assert errors == {k for k, good in enumerate(SNIPPETS.values()) if not good}


# ── who may write what ────────────────────────────────────────────────────────────────────────


def of_round(**more: Any) -> RoundLine:
    line = {"round": 1, "cohort": ["a"], "failures": {}, "train": {"loss": 1.0}}
    return cast(RoundLine, {**line, "bytes": {"up": 1, "down": 2}, "seconds": {}, **more})


@pytest.mark.parametrize("key", sorted(hints_of(RoundLine)))
def test_a_meter_takes_no_key_of_something_else(key: str) -> None:
    if key in hints_of(Figures):
        assert with_figures(of_round(), {key: 1})[key] == 1  # type: ignore[literal-required]
        return
    with pytest.raises(ValueError, match=f"'{key}'"):
        with_figures(of_round(), {key: 1})


def test_a_meter_of_a_stranger_gets_a_key_of_its_own() -> None:
    assert with_figures(of_round(), {"sparsity": {"mean": 0.5}}).get("sparsity") == {"mean": 0.5}


@pytest.mark.parametrize("key", sorted(hints_of(ClientLine)))
def test_a_client_says_nothing_in_the_server_s_place(key: str) -> None:
    """Not how its reply was taken, nor what it has spent of its privacy."""
    line: ClientLine = {"kind": "train", "round": 1, "site": "a", "status": "ok"}
    told = with_reported(line, {key: 7.0, "of-its-own": 8.0})
    own = key in hints_of(lines.Reported)
    assert told == {**line, **({key: 7.0} if own else {}), "of-its-own": 8.0}


# ── lines of whoever ──────────────────────────────────────────────────────────────────────────


def any_json(dice: random.Random, depth: int = 3) -> Any:
    kinds = [None, True, 0, -3, 1.5, float("nan"), "ok", "", 10**400]
    if depth == 0 or dice.random() < 0.5:
        return dice.choice(kinds)
    if dice.random() < 0.5:
        return [any_json(dice, depth - 1) for _ in range(dice.randrange(4))]
    words = [*hints_of(RoundLine), *hints_of(ClientLine), "relative", "epsilon", "up", "held", "x"]
    return {dice.choice(words): any_json(dice, depth - 1) for _ in range(dice.randrange(5))}


@pytest.mark.parametrize("kind", [RoundLine, ClientLine, Release, Summary])
@pytest.mark.parametrize("seed", range(50))
def test_whatever_is_read_fits_its_type_afterwards(kind: type[Any], seed: int) -> None:
    dice = random.Random(seed)
    found = {key: any_json(dice) for key in [*hints_of(kind), "unknown"] if dice.random() < 0.7}
    line = fitted(kind, found)
    wrong = [text for text in misfits(kind, line) if "not declared" not in text]
    assert wrong == []
    assert fitted(kind, line) == line or "nan" in str(line)  # nan is not itself
    assert line.get("unknown") == found.get("unknown") or "nan" in str(line)


def test_a_line_that_fits_stays_as_it_is() -> None:
    """The control; and what is not declared deep inside stays, too."""
    line = of_round(
        bias={"relative": 0.5, "cosine": None, "norm_ratio": 1, "forgotten": 0.0, "layers": {}},
        eval={"loss": 1, "accuracy": 0.5},
        meters={"a": {"b": [1, "x"]}},
        later={"version": 2},
    )
    assert fitted(RoundLine, line) == line


def test_damage_is_absent() -> None:
    found: dict[str, Any] = {
        "round": 2,
        "cohort": ["a", 3, None],
        "failures": {"nan": "a", "timeout": ["b", 4]},
        "train": {"loss": True},
        "bytes": {"up": None},
        "eval": "high",
        "privacy": {"site": {"epsilon": "low"}},
    }
    line = fitted(RoundLine, found)
    assert line["cohort"] == ["a"] and line["failures"] == {"timeout": ["b"]}
    assert line["train"] == {"loss": None} and line["bytes"] == {"up": 0, "down": 0}
    assert line["seconds"] == {} and "eval" not in line
    assert line.get("privacy", {}).get("site", {}).get("epsilon") is None


PATHS: Mapping[tuple[str, ...], bool] = {
    ("eval", "accuracy"): True,
    ("eval", "f1-of-a-stranger"): True,  # tasks name their metrics
    ("bias", "relative"): True,
    ("bias", "layers", "q", "relative"): True,
    ("meters", "a", "b", "c"): True,
    ("bias", "relativ"): False,
    ("bais",): False,
    ("clock", "elapsed"): True,
    ("clock", "elapsd"): False,
    ("train", "loss", "x"): False,
    ("privacy", "site", "epsilon"): True,
}


@pytest.mark.parametrize("keys", PATHS, ids=".".join)
def test_paths_are_held_to_the_declarations(keys: tuple[str, ...]) -> None:
    assert declared(RoundLine, keys) == PATHS[keys]


def test_what_every_line_has_is_what_every_run_ever_wrote() -> None:
    """A key that is required must stand in the oldest run directory: none may be added."""
    assert required_of(RoundLine) == {"round", "cohort", "failures", "train", "bytes", "seconds"}
    assert required_of(ClientLine) == {"kind", "round", "site"}
    assert required_of(Release) == {"round"}


if __name__ == "__main__":
    print(every_key())
