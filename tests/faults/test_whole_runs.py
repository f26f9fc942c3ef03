"""Rows of the fault catalogue that only a whole run can show: 14, 16, 69 and 70."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedft.api import Run
from fedft.core.data.source import load
from fedft.core.errors import Interrupted
from fedft.core.link.secrets import key_pem, new_key
from fedft.core.record import environment
from fedft.report import write_report
from fedft.server import identity
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate
from fedft.strategies import RULES
from fedft.strategies.base import Strategy
from fedft.trackers import Tracker

Table = Callable[..., dict[str, Any]]
SHORT = {"rounds": {"count": 2, "per-round": 3, "evaluate-every": 2}, "training": {"steps": 3}}


class Notes(Tracker):
    """Remembers what the user was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("other", [False, True])
def test_another_torch_is_told_when_a_run_goes_on(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    """Row 14."""
    asked = iter([False] * 3)
    with pytest.raises(Interrupted):
        simulate(parse_config(tiny_table()), tmp_path / "run", stop=lambda: next(asked, True))
    real, notes = environment.version, Notes()
    changed = {"torch": "9.9"} if other else {}
    monkeypatch.setattr(environment, "version", lambda name: changed.get(name) or real(name))
    resume(tmp_path / "run", trackers=[notes])
    assert any("is 9.9" in line and "not bit-exact" in line for line in notes.lines) == other


@pytest.mark.parametrize(("clock", "closes_early"), [("time", False), ("monotonic", True)])
def test_deadlines_are_not_moved_by_a_clock_that_jumps(
    tiny_table: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: str,
    closes_early: bool,
) -> None:
    """Row 16: each look at the clock finds it an hour on; where it is the wall clock, no matter."""
    real, hours = getattr(time, clock), itertools.count()
    monkeypatch.setattr(time, clock, lambda: real() + 3600.0 * next(hours))
    rounds = {**SHORT["rounds"], "deadline-s": 600.0, "quorum": 1}
    config = parse_config(tiny_table(**{**SHORT, "rounds": rounds}))
    if closes_early:
        with pytest.raises(Exception, match="timeout"):
            simulate(config, tmp_path / "run")
    else:
        run = Run(simulate(config, tmp_path / "run").path)
        assert all(not record["failures"] for record in run.rounds)


CANARY = "xylophonecanary"


def holders(folder: Path, word: bytes) -> set[str]:
    """The files below a folder that contain a word."""
    return {p.name for p in folder.rglob("*") if p.is_file() and word in p.read_bytes()}


def test_sample_text_stays_out_of_all_that_a_run_writes(
    tiny_table: Table,
    tiny_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Row 69; what a run does write, the names of the classes, the same search finds."""
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    lines = [json.dumps({**row, "text": f"{row['text']} {CANARY}"}) for row in rows]
    lines.insert(5, json.dumps({"text": CANARY}))  # a bad row, which is told about
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    table = tiny_table(**SHORT, data={"source": str(data), "skip-bad": True})
    notes = Notes()
    with caplog.at_level("DEBUG"):
        run = simulate(parse_config(table), tmp_path / "run", trackers=[notes])
        write_report([run.path], run.path / "report" / "report.html")
    told = capsys.readouterr()
    assert CANARY not in "".join([caplog.text, told.out, told.err, *notes.lines])
    assert holders(run.path, CANARY.encode()) == set()
    assert holders(run.path, b"animal") >= {"environment.json"}


def test_private_keys_stay_in_their_files(tmp_path: Path) -> None:
    """Row 69."""
    folder = tmp_path / "run" / "identity"
    authority, registry = identity.Authority(folder), identity.Registry(folder)
    authority.server(identity.Address(port=1))
    kit = registry.invite("ann", authority, identity.Address(port=1))
    identity.Audit(tmp_path / "run")("invited", "ann", f"until {kit.expires}")
    secrets = {line for line in kit.key.splitlines() if "-----" not in line}
    assert holders(tmp_path, b"PRIVATE KEY") == {"ca.key", "server.key"}
    assert not any(holders(tmp_path, line.encode()) for line in secrets)
    (tmp_path / "site.key").write_bytes(key_pem(new_key()))  # positive control of the search
    assert "site.key" in holders(tmp_path, b"PRIVATE KEY")


@pytest.fixture
def stock(tiny_model: Path) -> Iterator[Callable[[Path], torch.nn.Module]]:
    def load_stock(adapter: Path) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
        return PeftModel.from_pretrained(base, adapter).eval()

    yield load_stock


CLOCKED = {name: {"clients": 10, "speeds": [100.0]} for name in ("fedasync", "fedbuff")}
"""Fleets of the rules that need to know who is how fast."""


@pytest.mark.parametrize(
    "rule", [r for r in RULES if r().supports("lora")], ids=lambda r: r.__name__
)
def test_stock_peft_scores_as_the_run_did(
    tiny_table: Table,
    tmp_path: Path,
    stock: Callable[[Path], torch.nn.Module],
    rule: type[Strategy],
) -> None:
    """Row 70, for every rule; the adapter of another round, the positive control, scores otherwise."""
    name = rule.model_fields["name"].default
    table = tiny_table(**SHORT, strategy={"name": name}, fleet=CLOCKED.get(name, {}))
    table["rounds"] |= {"evaluate-every": 1, "keep-adapters": True}
    config = parse_config(table)
    run = Run(simulate(config, tmp_path / "run").path)
    test = load(config.data, "classification", seed=config.seed).test
    tokens = AutoTokenizer.from_pretrained(config.model.source)(
        list(test.values["text"]), padding=True, return_tensors="pt"
    )
    tokens.pop("token_type_ids", None)
    losses: list[float] = []
    for round_ in (1, 2):
        adapter = run.adapter(round_).save_pretrained(tmp_path / f"adapter-{round_}")
        with torch.inference_mode():
            logits = stock(adapter)(**tokens).logits
        losses.append(functional.cross_entropy(logits, torch.as_tensor(test.labels)).item())
    assert losses == pytest.approx([r["eval"]["loss"] for r in run.rounds], rel=1e-4)
    # Where B stays at the sites, the global adapter is nobody's model and stands still.
    assert abs(losses[0] - losses[1]) > 1e-4 or "B" in rule().personal
