"""Whole runs whose clients train by a function of the user's own."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import fedft
from fedft import cli
from fedft.clients.engines import copied
from fedft.core.errors import ConfigError, Interrupted, QuorumFailure, SecurityRefusal
from fedft.core.plugins import USER
from fedft.core.spec import TaskSpec
from fedft.core.trainers import REGISTRY
from fedft.server import forecast
from fedft.server.config_file import parse_config, parse_toml
from fedft.server.run import simulate
from tests.clients.trainers import own_trainers
from tests.clients.trainers.conftest import (
    OWN,
    client_lines,
    configuration,
    federated,
    reference,
)

Table = Callable[..., dict[str, Any]]
SMALL = {"count": 2, "per-round": 3, "evaluate-every": 2}


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "_known", {})


def digest(run: fedft.Run) -> str:
    return str(run.metrics["adapter_sha256"])


# ── equality ──────────────────────────────────────────────────────────────────────────────────


def test_transformers_trainer_configured_like_our_loop_comes_to_the_same(
    tiny_table: Table, still_model: Path, tmp_path: Path
) -> None:
    """Same order of rows, AdamW, a constant rate, clipping: 4 rounds agree to 1e-5."""
    table = tiny_table(model={"source": str(still_model)})
    ours = fedft.simulate(parse_config(table), run_dir=tmp_path / "ours")
    theirs = federated(table, "like_ours", tmp_path / "theirs")
    a, b = (run.adapter("last").factors().tensors() for run in (ours, theirs))
    start = max(float(t.abs().max()) for t in a.values())
    assert a.keys() == b.keys() and start > 0.1
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-5
    even = 0
    for mine, their in zip(client_lines(ours), client_lines(theirs), strict=True):
        assert their["site"] == mine["site"] and their["examples"] == mine["examples"]
        assert their["steps"] == mine["steps"]
        if mine["examples"] % 4 == 0:  # transformers takes the mean over steps, also of short ones
            even += 1
            assert their["loss"] == pytest.approx(mine["loss"], abs=1e-5)
    assert even
    control = federated(table, "plain", tmp_path / "control")  # another order of the rows
    c = control.adapter("last").factors().tensors()
    assert max(float((a[n] - c[n]).abs().max()) for n in a) > 1e-3


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("processes", marks=pytest.mark.crash),  # of the tier with processes
        pytest.param("ray", marks=pytest.mark.ray),
    ],
)
def test_workers_come_to_the_same_bytes_as_this_process(
    tiny_table: Table, tmp_path: Path, backend: str
) -> None:
    table = tiny_table(rounds=SMALL)
    here = federated(table, "plain", tmp_path / "here")
    table["engine"] = {**table["engine"], "backend": backend, "workers": 2}
    assert digest(federated(table, "plain", tmp_path / "there")) == digest(here)


# ── the name ──────────────────────────────────────────────────────────────────────────────────


def test_a_function_from_python_is_a_trainer_and_one_without_a_name_only_here(
    tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(rounds=SMALL)
    named = federated(table, "plain", tmp_path / "named")
    given = federated(table, own_trainers.plain, tmp_path / "given")
    assert digest(given) == digest(named)
    assert f'trainer = "{OWN}:plain"' in (given.directory / "config.toml").read_text()

    def local(model: Any, rows: Any, settings: Any) -> Any:
        return own_trainers.plain(model, rows, settings)

    run = fedft.simulate(
        parse_config(table), settings={"training.trainer": local}, run_dir=tmp_path / "local"
    )
    assert digest(run) == digest(named)
    table["engine"]["backend"] = "processes"
    with pytest.raises(ConfigError, match="within a function, where the workers"):
        configuration(table, local)
    with pytest.raises(ConfigError, match="a partial has no name of its own"):
        configuration(table, __import__("functools").partial(local))


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("own_trainer", "no trainer is called 'own_trainer'"),
        ("no_module_of_this_name:make", "there is no module no_module_of_this_name"),
        (f"{OWN}:plian", "has no plian; did you mean 'plain'"),
        (f"{OWN}:LOSES", "it is a str, and is called as make_trainer"),
        (f"{OWN}:reference", "has no reference"),
        ("os.path:join", "is no trainer|called as"),
        ("os.path:exists", r"it takes \(path\), and is called as make_trainer\(model, rows"),
        (3, "text is expected"),
    ],
)
def test_what_is_no_trainer_is_told_before_anything_starts(
    tiny_table: Table, trainer: object, said: str
) -> None:
    training = {**tiny_table()["training"], "trainer": trainer}
    if trainer == "os.path:join":  # takes any three: nobody can tell it from one that trains
        parse_config(tiny_table(training=training), trust=USER)
        return
    with pytest.raises(ConfigError, match=said) as caught:
        parse_config(tiny_table(training=training), trust=USER)
    assert "training.trainer" in str(caught.value) or "[training] trainer" in str(caught.value)


def test_a_run_directory_alone_imports_nothing(
    tiny_table: Table, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Resume, report and export: as other code from outside; --allow takes the name."""
    name = reference("plain")
    whole = federated(tiny_table(rounds=SMALL), "plain", tmp_path / "whole")
    stop = stop_after(1)
    with pytest.raises(Interrupted):
        simulate(
            configuration(tiny_table(rounds=SMALL), "plain"),
            tmp_path / "run",
            trackers=[stop],
            stop=stop,
        )
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["plugins"]
    assert recorded[name]["class"] == name and len(recorded[name]["sha256"]) == 64
    monkeypatch.setattr(REGISTRY, "_known", {})
    toml = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(SecurityRefusal, match=re.escape(f"--allow {name}")):
        parse_toml(toml, "config.toml")
    with pytest.raises(SecurityRefusal, match="is not imported because a run directory"):
        fedft.resume(tmp_path / "run")
    assert REGISTRY._known == {}
    monkeypatch.setattr(sys, "argv", ["fedft", "resume", str(tmp_path / "run"), "--allow", name])
    with pytest.raises(SystemExit) as ended:
        cli.main()
        raise SystemExit(0)
    assert not ended.value.code
    assert digest(fedft.Run(tmp_path / "run")) == digest(whole)
    monkeypatch.setattr(REGISTRY, "_known", {})
    resumed = fedft.resume(tmp_path / "run", allow=[own_trainers.plain])  # it is over already
    assert digest(resumed) == digest(whole)


def test_a_run_without_a_trainer_is_written_as_before(tiny_table: Table) -> None:
    config = parse_config(tiny_table())
    assert "trainer" not in config.to_toml()
    assert "trainer" not in config.task().model_dump_json()
    assert "trainer" not in forecast.forecast(config)
    own = configuration(tiny_table(), "plain")
    task = own.task()
    again = TaskSpec.model_validate_json(task.model_dump_json(), context=USER)
    assert again == task and again.trainer == reference("plain")
    assert own.training.local() == config.training.local()


def test_the_plan_says_who_trains(tiny_table: Table) -> None:
    config = configuration(tiny_table(engine={"cohort": "auto"}), "plain")
    cost = forecast.forecast(config)
    assert cost["cohort"] == 1 and cost["trainer"] == reference("plain")
    assert f"by {reference('plain')}, a plain loop of your own" in forecast.as_text(config, cost)


# ── what a trainer would leave undone ─────────────────────────────────────────────────────────

UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "dp": ({"training": {"dp": {"noise-multiplier": 1.0}}}, r"\[training\] dp asks for noise"),
    "method": ({"training": {"method": "proximal"}}, r"\[training\] method asks for a term"),
    "proximal-mu": ({"training": {"proximal-mu": 0.1}}, "asks for a proximal term"),
    "fedprox": ({"strategy": {"name": "fedprox"}}, "fedprox asks for a proximal term"),
    "around fedprox": (
        {"strategy": {"name": "norm-clip", "inner": {"name": "fedprox"}}},
        "norm-clip asks for a proximal term",
    ),
    "scaffold": ({"strategy": {"name": "scaffold"}}, "scaffold asks for the term 'control-var"),
    "feddyn": ({"strategy": {"name": "feddyn"}}, "feddyn asks for the term 'dynamic'"),
    "fednova": ({"strategy": {"name": "fednova"}}, "fednova asks for the term 'effective-steps'"),
    "hetlora": (
        {"strategy": {"name": "hetlora", "gamma": 0.5}},
        "hetlora asks for a penalty on the tail",
    ),
    "pruning": (
        {"pruning": {"selection": "random"}, "fleet": {"model-shares": [0.5]}},
        r"\[pruning\] selection = 'random' asks for a part of the blocks",
    ),
    "hydralora": (
        {"lora": {"method": "hydralora", "heads": 2}, "strategy": {"name": "hydralora"}},
        r"\[lora\] method = 'hydralora' asks for a router",
    ),
    "checkpointing": (
        {"engine": {"gradient-checkpointing": True}},
        r"\[engine\] gradient-checkpointing is of fedft's own loop",
    ),
    "cohort": ({"engine": {"cohort": 4}}, r"clients with a trainer are trained one by one"),
    "load-in": ({"model": {"load-in": "4bit"}}, r"\[model\] load-in asks for a base in few bits"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_a_trainer_would_leave_undone_is_refused_by_name_before_round_1(
    tiny_table: Table, what: str
) -> None:
    changes, said = UNFIT[what]
    parse_config(tiny_table(**changes), trust=USER)  # the control: without a trainer it may be
    with pytest.raises(ConfigError, match=said):
        configuration(tiny_table(**changes), "plain")


FIT = ["fedavg-lora", "rolora", "flora", "fedex-lora", "fedsvd", "fed-sb", "fedadam"]
FIT += ["flexlora", "lora-fair", "fedsa-lora", "krum", "central-dp"]


@pytest.mark.parametrize(
    "rule", ["ffa-lora", *(pytest.param(rule, marks=pytest.mark.slow) for rule in FIT)]
)
def test_rules_that_ask_for_plain_steps_go_with_it(
    tiny_table: Table, tmp_path: Path, rule: str
) -> None:
    name = {"name": rule, **({"noise-multiplier": 0.1} if rule == "central-dp" else {})}
    table = tiny_table(rounds=SMALL, strategy=name, training={"batch-size": 8})
    run = federated(table, "quick", tmp_path / "run")
    assert [line["failures"] for line in run.rounds] == [{}, {}]


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trainer", ["at_one", "poisons_at_one"])
def test_one_client_that_fails_ends_no_run_and_changes_no_other(
    tiny_table: Table, tmp_path: Path, trainer: str
) -> None:
    rounds = {"count": 2, "per-round": 8, "quorum": 7, "evaluate-every": 2}
    run = federated(tiny_table(rounds=rounds), trainer, tmp_path / "run")
    assert [line["failures"] for line in run.rounds] == [{"error": [own_trainers.LOSES]}] * 2
    lines = [line for line in client_lines(run) if line["site"] == own_trainers.LOSES]
    assert len(lines) == 2 and all(line["code"] == 102 for line in lines)
    said = {"at_one": r"in at_one: RuntimeError: at this one", "poisons_at_one": "the frozen base"}
    assert all(re.search(said[trainer], line["reason"]) for line in lines)
    assert run.metrics["adapter_sha256"] == _alone(tiny_table, tmp_path, rounds)


_known: dict[str, str] = {}


def _alone(tiny_table: Table, tmp_path: Path, rounds: dict[str, Any]) -> str:
    """Where the one fails without touching anything; both kinds of failure must come to it."""
    if "at_one" not in _known:
        other = federated(tiny_table(rounds=rounds), "at_one", tmp_path / "alone")
        _known["at_one"] = digest(other)
    return _known["at_one"]


def test_without_the_look_a_poisoned_base_reaches_the_others(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    rounds = {"count": 2, "per-round": 8, "quorum": 7, "evaluate-every": 2}
    monkeypatch.setattr(copied, "_sum", lambda weight: 0)
    table = tiny_table(rounds=rounds)
    table["engine"]["verify"] = False  # which would end the run by it
    run = federated(table, "poisons_at_one", tmp_path / "run")
    assert digest(run) != _alone(tiny_table, tmp_path, rounds)


def test_where_all_fail_the_run_pauses(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(rounds={**SMALL, "retries": 0})
    with pytest.raises(QuorumFailure):
        federated(table, "raises", tmp_path / "run")


def test_clients_are_weighed_by_their_rows(tiny_table: Table, tmp_path: Path) -> None:
    """Also where [training] asks our own loop for fewer."""
    table = tiny_table(rounds=SMALL, training={"steps": 1})
    run = federated(table, "plain", tmp_path / "run")
    for line in client_lines(run):
        assert line["examples"] > 4 or line["steps"] == 1
    assert any(line["examples"] > 4 for line in client_lines(run))


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(900)
@pytest.mark.crash
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(tiny_table: Table, tmp_path: Path) -> None:
    table = tiny_table(rounds={"count": 6, "per-round": 3, "evaluate-every": 3})
    whole = federated(table, "plain", tmp_path / "whole")
    table["training"]["trainer"] = reference("plain")
    config = tmp_path / "config.toml"
    config.write_text(tomli_w.dumps(table))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fedft", "simulate", str(config), "--run-dir", str(run)]
    kills = 0
    while kills < 2:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = _rounds(run)
        ends = time.monotonic() + 400
        while _rounds(run) <= before and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(0.15)  # into the training of the next round
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        command = [sys.executable, "-m", "fedft", "resume", str(run), "--allow", reference("plain")]
    assert 1 < _rounds(run) < 6
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert digest(fedft.Run(run)) == digest(whole)
    a, b = (r.adapter("last").factors().tensors() for r in (fedft.Run(run), whole))
    assert all(torch.equal(a[n], b[n]) for n in a)


def _rounds(run: Path) -> int:
    lines = run / "rounds.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0
