"""Real client processes over loopback with mutual TLS: the same bytes as a simulation, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.superlink import free_port
from fedft.api import Run
from fedft.clients.ledger import Account, Ledger
from fedft.core.data.rowkeys import row_keys
from fedft.core.errors import ConfigError, EnvironmentFailure, QuorumFailure
from fedft.core.privacy.accounting import example_epsilon
from fedft.core.record.rundir import RunDir
from fedft.core.spec import DataSpec
from fedft.server import identity
from fedft.server.config_file import parse_config
from fedft.server.serve import Hosting, serve
from fedft.trackers import Tracker
from tests.server.stage import (
    FAST,
    QUICK,
    Cable,
    Stage,
    kill,
    rounds_done,
    simulated,
    site_files,
    start_all,
    until,
)

pytestmark = pytest.mark.grpc

Table = Callable[..., dict[str, Any]]


def test_four_client_processes_give_the_bytes_of_a_simulation(
    tiny_table: Table, stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """Law 6 over gRPC."""
    config = parse_config(tiny_table(fleet={"clients": 4}))
    reference = simulated(config, tmp_path / "simulated")
    files = site_files(config, reference, tmp_path / "files")
    play = stage(config)
    play.start_server()
    for name, file in files.items():
        play.invite(name)
        play.start_client(name, file)
    run = play.finish()
    assert run.metrics["adapter_sha256"] == reference.metrics["adapter_sha256"]
    assert run.metrics["history_sha256"] == reference.metrics["history_sha256"]
    assert run.metrics["final"] == reference.metrics["final"]
    assert run.metrics["bytes"] == reference.metrics["bytes"]


def test_sites_that_train_with_dp_sgd_spend_what_the_simulation_says(
    tiny_table: Table, stage: Callable[..., Stage], tmp_path: Path
) -> None:
    dp = {"noise-multiplier": 1.5, "max-grad-norm": 0.5}
    config = parse_config(
        tiny_table(
            fleet={"clients": 2},
            rounds={"count": 2, "per-round": 2, "evaluate-every": 1},
            strategy={"name": "ffa-lora"},
            training={"steps": 2, "dp": dp},
        )
    )
    reference = simulated(config, tmp_path / "simulated")
    files = site_files(config, reference, tmp_path / "files")
    play = stage(config)
    play.start_server()
    for name, file in files.items():
        play.invite(name)
        play.start_client(name, file)
    run = play.finish()
    assert RunDir.open(run.directory).releases() == RunDir.open(reference.directory).releases()
    assert [line["privacy"] for line in run.rounds] == [
        line["privacy"] for line in reference.rounds
    ]
    assert run.metrics["privacy"] == reference.metrics["privacy"]
    assert run.metrics["privacy"]["example"]["epsilon"] > 0
    own, simulated_own = (
        {
            (line["round"], line["site"]): line["epsilon"]
            for line in RunDir.open(one.directory).clients()
        }
        for one in (run, reference)
    )
    assert len(own) == 4 and own == simulated_own
    told = [line for line in RunDir.open(run.directory).clients() if line["kind"] == "train"]
    assert not any({"loss", "grad_A_norm", "grad_B_norm"} & line.keys() for line in told)
    # Noise is each process's own: it is no repetition.
    assert run.metrics["adapter_sha256"] != reference.metrics["adapter_sha256"]
    # What each client entered by itself comes to the same, to the last bit.
    last = max(line["round"] for line in told)
    for name, file in files.items():
        account = client_ledger(play.folder / "ledger", file).account()
        assert account.results == 2 and account.runs == {"run"}
        assert account.epsilon() == own[last, name]


def client_ledger(folder: Path, data: Path) -> Ledger:
    return Ledger(folder, row_keys(DataSpec(source=str(data)), "classification"))


def test_a_clients_ledger_covers_kills_renamed_runs_and_moved_files(
    tiny_table: Table, stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """Two runs of different names on the same rows, a client killed with -9 in each of them.

    What the servers took of it, both together, is never more than what the client has entered.
    """
    config = parse_config(
        tiny_table(
            fleet={"clients": 2},
            rounds={"count": 3, "per-round": 2, "evaluate-every": 3},
            strategy={"name": "ffa-lora"},
            training={"steps": 2, "dp": {"noise-multiplier": 1.5, "max-grad-norm": 0.5}},
        )
    )
    files = site_files(config, simulated(config, tmp_path / "simulated"), tmp_path / "files")
    victim, other = sorted(files)
    taken: dict[str, int] = dict.fromkeys(files, 0)
    for attempt in ("one", "two"):
        play = stage(config, attempt)
        play.name, play.ledgers = f"run-{attempt}", tmp_path / "ledger"
        play.start_server()
        for name, file in files.items():
            moved = play.folder / f"{name}-moved.jsonl"
            rows = file.read_text().splitlines(keepends=True)
            moved.write_text("".join(reversed(rows) if attempt == "two" else rows))
            files[name] = moved
            play.invite(name)
            play.start_client(name, moved)
        before = client_ledger(play.ledgers, files[victim]).account().results

        def entered(before: int = before, play: Stage = play) -> bool:
            assert play.ledgers is not None
            return client_ledger(play.ledgers, files[victim]).account().results > before

        until(entered)  # the first result is about to leave, or has left
        kill(play.clients[victim])
        play.start_client(victim, files[victim])
        run = play.finish()
        for line in RunDir.open(run.directory).clients():
            taken[line["site"]] += line["kind"] == "train" and line["status"] == "ok"
        for name, file in files.items():
            account = client_ledger(play.ledgers, file).account()
            assert account.results >= taken[name]
            assert account.epsilon() >= spent_by(account, taken[name]), "over both runs"
            assert account.runs == ({"run-one"} if attempt == "one" else {"run-one", "run-two"})
        assert client_ledger(play.ledgers, files[other]).account().results == taken[other]
        assert client_ledger(play.ledgers, files[victim]).account().results <= taken[victim] + 2
    assert taken == dict.fromkeys(files, 6)
    assert len(list((tmp_path / "ledger").glob("*.jsonl"))) == 2, "one a data set, not one a run"


def spent_by(account: Account, results: int) -> float:
    ((event, _),) = account.steps.items()
    return example_epsilon([(*event, 2 * results)], 1e-5)


def disturb(play: Stage, files: dict[str, Path]) -> None:
    """Kill and restart a client after the first round, and the server in the middle of a later one."""
    held, victim = sorted(files)[:2]
    until(lambda: rounds_done(play) >= 1)
    kill(play.clients[victim])
    play.start_client(victim, files[victim])
    until(lambda: rounds_done(play) >= 2)
    os.kill(play.clients[held].pid, signal.SIGSTOP)  # its round cannot close
    time.sleep(1.0)
    before = rounds_done(play)
    time.sleep(1.0)  # the results of the others are in
    assert rounds_done(play) == before and not play.run.metrics
    kill(play.server)
    os.kill(play.clients[held].pid, signal.SIGCONT)
    play.start_server()


def test_eight_clients_of_mixed_ranks_survive_kills_of_a_client_and_of_the_server(
    tiny_table: Table, stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """Rows 24 and 25: the bytes are those of a simulation that nothing happened to."""
    table = tiny_table(
        strategy={"name": "hetlora"},
        fleet={"clients": 8, "ranks": [2, 4]},
        rounds={"count": 5, "per-round": 8, "quorum": 8},
        training={"epochs": 3},
    )
    config = parse_config(table)
    reference = simulated(config, tmp_path / "simulated")
    files = site_files(config, reference, tmp_path / "files")
    ranks = {
        line["site"]: line["rank"]
        for line in map(
            json.loads, (reference.directory / "clients.jsonl").read_text().splitlines()
        )
    }
    assert set(ranks.values()) == {2, 4}
    play = stage(config)
    play.ranks = ranks
    start_all(play, files)
    disturb(play, files)
    run = play.finish()
    assert run.metrics["adapter_sha256"] == reference.metrics["adapter_sha256"]
    assert run.metrics["history_sha256"] == reference.metrics["history_sha256"]
    assert all(not record["failures"] for record in run.rounds)


def test_parts_that_stay_at_the_sites_survive_kills_too(
    tiny_table: Table, stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """FedSA-LoRA keeps B and the head at the sites, and each site judges its own model."""
    table = tiny_table(
        strategy={"name": "fedsa-lora"},
        fleet={"clients": 3},
        data={"holdout": 0.25},
        rounds={"count": 5, "per-round": 3, "quorum": 3, "evaluate-every": 1},
        training={"epochs": 3},
    )
    config = parse_config(table)
    files = site_files(config, simulated(config, tmp_path / "simulated"), tmp_path / "files")
    quiet, disturbed = stage(config, "quiet"), stage(config, "disturbed")
    start_all(quiet, files)
    expected = quiet.finish()
    start_all(disturbed, files)
    disturb(disturbed, files)
    run = disturbed.finish()
    assert run.metrics["history_sha256"] == expected.metrics["history_sha256"]
    assert [r["sites"] for r in run.rounds] == [r["sites"] for r in expected.rounds]
    assert all(record["sites"]["n"] == 3 for record in run.rounds)
    # Positive control: without its own parts a site goes another way.
    forgetful = stage(config, "forgetful")
    start_all(forgetful, files)
    victim = sorted(files)[1]
    until(lambda: rounds_done(forgetful) >= 1)
    kill(forgetful.clients[victim])
    for kept in (forgetful.folder / victim / "kept").rglob("*.safetensors"):
        kept.unlink()
    forgetful.start_client(victim, files[victim])
    other = forgetful.finish()
    assert other.metrics["history_sha256"] != expected.metrics["history_sha256"]


def test_a_client_that_was_away_at_the_end_hears_that_the_run_is_over(
    tiny_table: Table, stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """From the server that lingers for it, or from the one that is started again for it."""
    config = parse_config(
        tiny_table(fleet={"clients": 3}, rounds={"count": 3, "per-round": 2, "quorum": 1})
    )
    files = site_files(config, simulated(config, tmp_path / "simulated"), tmp_path / "files")
    away, *others = sorted(files)
    for linger in (60.0, 0.0):
        impatient = replace(FAST, absence=0.5)
        options = {"linger_s": linger, "grace_s": 0.1, "first": 3, "timing": impatient}
        play = stage(config, f"linger-{linger:.0f}", **options)
        start_all(play, files)
        until(lambda play=play: rounds_done(play) >= 1)
        kill(play.clients.pop(away))
        until(lambda play=play: (play.run_dir / "summary.json").exists())
        if not linger:
            assert play.finish()
            assert identity.Registry(play.run_dir / "identity").unaware() == [away]
        play.start_client(away, files[away])
        if not linger:
            play.hosting = Hosting(timing=FAST)
            play.start_server()
        play.finish()
        clients = identity.Registry(play.run_dir / "identity").clients()
        assert {clients[name].state for name in files} == {"done"}
        assert set(play.clients) == {away, *others}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [6.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_cut_of_the_network_loses_nothing(
    tiny_table: Table, stage: Callable[..., Stage], tmp_path: Path, seconds: float
) -> None:
    """Row 26; without patience, the positive control, it costs the sites their places."""
    table = tiny_table(
        fleet={"clients": 3},
        rounds={"count": 5, "per-round": 3, "quorum": 3},
        training={"epochs": 3},
    )
    config = parse_config(table)
    reference = simulated(config, tmp_path / "simulated")
    files = site_files(config, reference, tmp_path / "files")
    for absence in (seconds + 60.0, 0.1):
        timing = replace(FAST, heartbeat=seconds / 12, silence=seconds / 3, absence=absence)
        play = stage(config, f"absence-{absence:.0f}", timing=timing)
        play.cable = Cable()
        play.client_timing = replace(QUICK, heartbeat=timing.heartbeat, silence=timing.silence)
        start_all(play, files)
        until(lambda play=play: rounds_done(play) >= 1)
        play.cable.cut(seconds)
        assert not play.run.metrics, "the run was over before the network was cut"
        run = play.finish()
        assert any(record["failures"] for record in run.rounds) == (absence < 1)
        assert run.metrics["history_sha256"] == reference.metrics["history_sha256"]
        lines = [json.loads(x) for x in (play.run_dir / "clients.jsonl").read_text().splitlines()]
        counted = [(x["round"], x["site"]) for x in lines if x["status"] == "ok"]
        assert sorted(counted) == [(r, s) for r in range(1, 6) for s in sorted(files)]
        audit = (play.run_dir / "audit.jsonl").read_text()
        assert audit.count("nothing was heard") >= 3


def test_a_second_server_is_refused_until_the_first_is_dead(
    tiny_table: Table, stage: Callable[..., Stage]
) -> None:
    """Row 12."""
    play = stage(parse_config(tiny_table()))
    play.start_server()
    until(lambda: (play.run_dir / "identity" / "address.json").exists())
    short = replace(play.hosting, patience_s=0.5)
    with pytest.raises(EnvironmentFailure, match=str(play.server.pid)):
        serve(play.config, play.run_dir, identity.Address(), hosting=short)
    kill(play.server)
    with pytest.raises(QuorumFailure):  # it listened, and nobody came
        serve(play.config, play.run_dir, identity.Address(), hosting=short)


def test_a_server_without_clients_waits_in_sight_and_pauses(
    tiny_table: Table, tmp_path: Path
) -> None:
    """Rows 19 and 20: exit 4, and the same command goes on with the same identity and port."""

    class Notes(Tracker):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    config, notes = parse_config(tiny_table()), Notes()
    hosting = Hosting(patience_s=0.5, timing=FAST)
    for _ in range(2):
        with pytest.raises(QuorumFailure, match="0 clients were connected") as failure:
            serve(config, tmp_path / "run", identity.Address(), hosting=hosting, trackers=[notes])
        assert failure.value.exit_code == 4
    assert any("0 of 4 connected; waiting" in line for line in notes.lines)
    listening = {line.split(",")[0] for line in notes.lines if line.startswith("listening")}
    assert len(listening) == 1
    changed = parse_config(tiny_table(training={"lr": 0.5}))
    with pytest.raises(ConfigError, match=r"\[training\] lr"):
        serve(changed, tmp_path / "run", identity.Address(), hosting=hosting)


def fedft(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedft", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, **options)


def metrics(port: int) -> str:
    """What Prometheus would read; empty while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def here(*arguments: str | Path) -> str:
    """A command in this process, which has its imports behind it; what it printed."""
    from typer.testing import CliRunner

    from fedft.cli import cli

    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_commands_as_a_user_types_them(
    tiny_table: Table, tmp_path: Path, tiny_data: Path
) -> None:
    import tomli_w

    table = tiny_table(fleet={"clients": 2}, rounds={"count": 2, "per-round": 2, "quorum": 2})
    config, run_dir = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(tomli_w.dumps(table))
    port = free_port()
    running = [fedft("serve", config, "--run-dir", run_dir, "--json", "--status-port", str(port))]
    try:
        until(lambda: (run_dir / "identity" / "address.json").exists())
        until(lambda: "fedft_clients_connected 0.0" in metrics(port))
        for name in ("ann", "bob"):
            kit = tmp_path / f"{name}.kit"
            assert "fedft join" in here("invite", name, "--run-dir", run_dir, "-o", kit)
            options = ("--data", tiny_data, "--threads", "1", "--give-up", "60")
            options += ("--model", table["model"]["source"])
            environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / name)}
            running.append(fedft("join", kit, *options, env=environment))
        out, err = running[0].communicate(timeout=200)
        assert running[0].returncode == 0, err
        for process in running[1:]:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert "round 2: train accepted" in err
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert json.loads(out)["status"] == "finished"
    assert Run(run_dir).adapter("last").round == 2
    here("revoke", "bob", "--run-dir", run_dir, "--why", "left")
    listed = json.loads(here("clients", "--run-dir", run_dir, "--json"))
    assert [(c["name"], c["state"]) for c in listed] == [("ann", "done"), ("bob", "revoked")]
    assert "revoked" in here("clients", "--run-dir", run_dir)
    with pytest.raises(ConfigError, match="no file"):
        here("join", tmp_path / "nowhere.kit", "--data", tiny_data)


def test_what_a_site_is_told_and_asked_before_it_may_join(
    tiny_table: Table, tmp_path: Path, tiny_data: Path
) -> None:
    """Row 28: rank and memory are weighed with both figures; the server's own files stay its own."""
    from fedft.core.types import Site as Member
    from fedft.server.serve import for_sites, objection, sites_task
    from fedft.server.setting import prepare_run

    config = for_sites(parse_config(tiny_table()))
    with RunDir.create(tmp_path / "run") as run:
        setting = prepare_run(config, run)
    told = sites_task(setting).model_dump_json()
    assert str(tiny_data) not in told and str(tmp_path) not in told
    assert objection(setting, Member("ann", 5)) is None
    assert objection(setting, Member("ann", 5, rank=4, memory_mib=4096.0)) is None
    poor = objection(setting, Member("ann", 5, memory_mib=0.01)) or ""
    assert "MiB at rank 4" in poor and "grants 0 MiB" in poor
    assert "largest is 4" in (objection(setting, Member("ann", 5, rank=8)) or "")
    assert "needs 4" in (objection(setting, Member("ann", 5, rank=2)) or "")
    private = replace(setting, config=parse_config(tiny_table(training={"dp": {}})))
    assert "--memory" in (objection(private, Member("ann", 5, memory_mib=4096.0)) or "")
    assert objection(private, Member("ann", 5)) is None
    mixed = replace(setting, config=parse_config(tiny_table(strategy={"name": "flexlora"})))
    assert objection(mixed, Member("ann", 5, rank=2)) is None
    for lora, why in (({"rslora": True}, "no common alpha"), ({"init": "pissa"}, "its one rank")):
        table = tiny_table(strategy={"name": "flexlora"}, lora=lora)
        one_rank = replace(setting, config=parse_config(table))
        assert why in (objection(one_rank, Member("ann", 5, rank=2)) or "")
        assert objection(one_rank, Member("ann", 5, rank=4)) is None


@pytest.mark.parametrize("wrong", [{"first": 0}, {"patience_s": float("nan")}, {"linger_s": -1.0}])
def test_patience_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is no"):
        Hosting(**wrong)
    assert Hosting(first=1, patience_s=0.0, linger_s=0.0)


def test_a_server_without_tls_starts_in_a_new_folder(tiny_table: Table, tmp_path: Path) -> None:
    """Nobody makes an authority there, nor the folder with it."""
    short = Hosting(patience_s=0.2, timing=FAST)
    with pytest.raises(QuorumFailure):
        serve(
            parse_config(tiny_table()),
            tmp_path / "run",
            identity.Address(insecure=True),
            hosting=short,
        )
    assert identity.load_address(tmp_path / "run" / "identity").insecure
