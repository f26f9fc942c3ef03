"""Rows 18 to 29 and 71 over real gRPC with mutual TLS: real client processes, a real `fedft serve`.

Whatever one client does, rounds close by quorum and deadline, and a run that cannot go on pauses.
"""

import json
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedft.clients.work import Timing as ClientTiming
from fedft.server import identity
from fedft.server.config_file import parse_config
from tests.faults import misbehaving
from tests.server.stage import processes, until
from tests.server.stub_clients import least_mib

pytestmark = [pytest.mark.grpc, pytest.mark.timeout(240)]

Table = Callable[..., dict[str, Any]]
QUICK = ClientTiming(heartbeat=0.5, silence=10.0, first_delay=0.1, longest_delay=0.5, give_up=120.0)


@dataclass
class Lab:
    """A server, by its command, and clients of all kinds."""

    folder: Path
    table: dict[str, Any]
    data: Path
    server: Any = None
    clients: dict[str, Any] = field(default_factory=dict[str, Any])
    port: int = 0

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def serve(self, *options: str) -> None:
        config = self.folder / "config.toml"
        config.write_text(tomli_w.dumps(self.table))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        arguments = ["serve", str(config), "--run-dir", str(self.run_dir), "--linger", "10"]
        arguments += ["--status-port", str(self.port), *options]
        self.server = self._start(misbehaving.command, arguments, self.folder / "server.log")
        until(lambda: (self.run_dir / "identity" / "address.json").exists() or not self.running)

    def join(self, name: str, kind: str = "good", **options: Any) -> None:
        kit = self.folder / f"{name}.kit"
        if not kit.exists():
            identity.invite(self.run_dir, name, kit)
        options = {"model": self.table["model"]["source"], **options}
        about = (kind, kit, self.data, self.folder / name, QUICK, self.log(name), options)
        self.clients[name] = self._start(misbehaving.client, *about)

    def _start(self, target: Any, *arguments: Any) -> Any:
        process = processes().Process(target=target, args=arguments, daemon=True)
        process.start()
        return process

    def leave(self, name: str) -> None:
        client = self.clients.pop(name)
        os.kill(client.pid, signal.SIGTERM)
        client.join(30)

    def kill(self, name: str) -> None:
        client = self.clients.pop(name)
        client.kill()
        client.join(10)

    @property
    def running(self) -> bool:
        return self.server.is_alive()

    def exit_code(self, seconds: float = 150.0) -> int | None:
        self.server.join(seconds)
        return self.server.exitcode

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        log = self.log(name)
        return log.read_text() if log.exists() else ""

    @property
    def logs(self) -> str:
        """What everybody said last, for whoever reads why a test failed."""
        return "\n".join(
            f"── {log.stem}\n{log.read_text()[-4000:]}" for log in sorted(self.folder.glob("*.log"))
        )

    def rounds(self) -> list[dict[str, Any]]:
        return read(self.run_dir / "rounds.jsonl")

    def counted(self, round_: int) -> list[str]:
        """Who counts in a round."""
        lines = read(self.run_dir / "clients.jsonl")
        return sorted(x["site"] for x in lines if (x["round"], x["status"]) == (round_, "ok"))

    def status(self, what: str = "") -> str:
        """The page, or the metrics; empty while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{what}", timeout=5) as page:
                return page.read().decode()
        except OSError:
            return ""

    def close(self) -> None:
        for process in [self.server, *self.clients.values()]:
            if process is not None and process.is_alive():
                process.kill()
                process.join(10)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def lab(tmp_path: Path, tiny_table: Table, tiny_data: Path) -> Iterator[Callable[..., Lab]]:
    made: list[Lab] = []

    def make(name: str = "lab", **rounds: Any) -> Lab:
        folder = tmp_path / name
        folder.mkdir()
        defaults = {"count": 2, "quorum": 1, "retries": 0, "evaluate-every": 10, "gather-s": 3}
        settings = {**defaults, **rounds}
        table = tiny_table(fleet={"clients": settings["per-round"]}, rounds=settings)
        table["training"] = {"batch-size": 8, "lr": 1e-2, "steps": 2}
        made.append(Lab(folder, table, tiny_data))
        return made[-1]

    yield make
    for one in made:
        one.close()


GOOD = ("good1", "good2", "good3")


def test_eight_clients_of_which_five_misbehave_finish_within_their_deadlines(
    lab: Callable[..., Lab],
) -> None:
    """Rows 18, 24 and 71. One raises in every round, one dies, one hangs, one sends NaN, one leaves."""
    deadline = 12  # long enough for a first progress line
    here = lab(count=5, quorum=3, retries=2, **{"per-round": 8, "deadline-s": deadline})
    here.serve("--wait-for", "8")
    for name in (*GOOD, "leaves"):
        here.join(name)
    for kind in ("raises", "dies", "hangs", "nan"):
        here.join(kind, kind)
    until(lambda: len(here.rounds()) >= 1)
    here.leave("leaves")
    until(lambda: len(here.rounds()) >= 3)
    here.join("leaves")
    assert here.exit_code() == 0, here.logs
    rounds = here.rounds()
    assert [record["round"] for record in rounds] == [1, 2, 3, 4, 5]
    for record in rounds:
        assert record["seconds"]["train"] <= record["attempts"] * (deadline + 2)
        failures = record["failures"]
        assert "raises" in failures["error"] and "nan" in failures["nan"]
        assert not {"raises", "dies", "hangs", "nan"} & set(here.counted(record["round"]))
        assert len(here.counted(record["round"])) >= 3
    assert "hangs" in rounds[0]["failures"]["timeout"]
    assert "leaves" in here.counted(1) and "leaves" in here.counted(5)
    # Who misbehaves is told so, and who watches the server sees whom it waits for, and how long.
    assert "round 1: train failed: it failed (failed): RuntimeError: no disk" in here.said("raises")
    assert "round 1: train refused (nan: " in here.said("nan")
    line = r"round \d: \d of 8 answered; waiting for .*hangs \(training round \d\), 1\d s"
    assert re.search(line, here.said("server"))
    assert all(here.clients[name].exitcode in (0, None) for name in GOOD)


def test_without_a_deadline_the_same_hang_holds_the_round(lab: Callable[..., Lab]) -> None:
    """The control of the test above; and everybody sees what it waits for."""
    here = lab(**{"per-round": 2, "deadline-s": 100_000})
    here.serve("--wait-for", "2")
    here.join("good")
    here.join("hangs", "hangs")
    until(lambda: "round 1: train accepted" in here.said("good"))
    until(lambda: "waiting for hangs (training round 1), " in here.said("server"))
    line = r"round 1: 1 of 2 answered; waiting for hangs \(training round 1\), \d+ s; gives up at "
    assert re.search(line, here.said("server"))
    assert re.search(line, here.status())
    assert "connected, training round 1" in here.status()
    found = dict(re.findall(r"^(fedft_waiting_\w+) (\S+)$", here.status("metrics"), re.MULTILINE))
    assert float(found["fedft_waiting_clients"]) == 1
    assert float(found["fedft_waiting_done"]) == 1
    assert float(found["fedft_waiting_seconds"]) > 5
    assert float(found["fedft_waiting_left_seconds"]) > 10_000
    assert here.rounds() == [] and here.running


def test_without_quorum_the_same_clients_are_asked_again_then_the_run_pauses_and_goes_on(
    lab: Callable[..., Lab],
) -> None:
    """Rows 19 and 71: the model stays, exit 4, and the same command goes on with better clients."""
    here = lab(quorum=3, retries=1, **{"per-round": 4, "deadline-s": 4})
    here.serve("--wait-for", "4")
    kinds = ("raises", "hangs", "nan")
    here.join("good")
    for kind in kinds:
        here.join(kind, kind)
    assert here.exit_code() == 4, here.logs
    assert "3 needed, after 2 attempts" in here.said("server")
    assert "Go on with the same command" in here.said("server")
    assert here.rounds() == []
    # The retry reached them: there is nobody else, and their work is the same.
    assert here.said("raises").count("round 1: train failed") == 2
    assert here.said("nan").count("round 1: train refused (nan") == 2
    assert here.said("good").count("round 1: training") == 1  # what it had is sent again
    assert here.said("good").count("round 1: train accepted") == 2
    for kind in kinds:
        here.kill(kind)
        here.join(kind)
    here.serve()
    assert here.exit_code() == 0, here.logs
    assert [len(here.counted(round_)) for round_ in (1, 2)] == [4, 4]


def test_a_result_that_was_no_good_is_computed_anew(lab: Callable[..., Lab]) -> None:
    """Row 71: a client that were to keep its NaN for ever would have to be restarted by hand."""
    here = lab(quorum=1, retries=1, **{"per-round": 1})
    here.serve()
    here.join("ann", "nan_once")
    assert here.exit_code() == 0, here.logs
    assert here.rounds()[0]["attempts"] == 2
    assert here.rounds()[0]["failures"] == {"nan": ["ann"]}
    assert here.said("ann").count("round 1: training") == 2


def test_all_clients_vanish_and_come_back(lab: Callable[..., Lab]) -> None:
    """Row 20: in sight, then a pause; with the clients back, the same command goes on."""
    here = lab(count=3, quorum=2, **{"per-round": 2, "deadline-s": 3})
    here.serve("--wait-for", "2", "--patience", "4")
    here.join("ann")
    here.join("bob")
    until(lambda: len(here.rounds()) >= 1)
    for name in ("ann", "bob"):
        os.kill(here.clients[name].pid, signal.SIGSTOP)  # nothing of them is heard any more
    assert here.exit_code() == 4, here.logs
    for name in ("ann", "bob"):
        os.kill(here.clients[name].pid, signal.SIGCONT)
    here.serve("--patience", "60")
    assert here.exit_code() == 0, here.logs
    assert [record["round"] for record in here.rounds()] == [1, 2, 3]


def test_a_straggler_is_late_and_a_patient_server_counts_it(lab: Callable[..., Lab]) -> None:
    """Row 21, with its control."""
    for deadline in (3, 60):
        here = lab(f"deadline-{deadline}", **{"per-round": 2, "deadline-s": deadline})
        here.serve("--wait-for", "2")
        here.join("good")
        here.join("slow", "late")
        assert here.exit_code() == 0, here.logs
        patient = deadline > 5
        assert ("slow" in here.counted(1)) == patient
        assert ("slow" in here.rounds()[0]["failures"].get("timeout", [])) != patient
        assert ("round 1: train late" in here.said("slow")) != patient


@pytest.mark.parametrize("kind", ["good", "thrice", "stale"])
def test_what_is_said_three_times_counts_once_and_what_is_stale_not_at_all(
    lab: Callable[..., Lab], kind: str
) -> None:
    """Rows 22 and 23; the good one is the control."""
    here = lab(**{"per-round": 2, "deadline-s": 4 if kind == "stale" else 60})
    here.serve("--wait-for", "2")
    here.join("good")
    here.join("odd", kind)
    assert here.exit_code() == 0, here.logs
    for round_ in (1, 2):
        assert here.counted(round_).count("odd") == (kind != "stale")
    events = {line["event"] for line in read(here.run_dir / "audit.jsonl")}
    expected = {"good": set[str](), "thrice": {"duplicate"}, "stale": {"stale"}}[kind]
    assert events & {"duplicate", "stale"} == expected


def test_who_is_turned_away_is_named_with_the_reason(lab: Callable[..., Lab]) -> None:
    """Rows 28 and 29: at the client, on the server's console, and on its page; others go on."""
    here = lab(quorum=2, **{"per-round": 2})
    here.serve("--wait-for", "2")
    here.join("poor", memory_mib=1.0)
    here.join("empty", "nobody")
    until(lambda: not here.clients["poor"].is_alive() and not here.clients["empty"].is_alive())
    assert here.clients["poor"].exitcode == here.clients["empty"].exitcode == 5
    assert re.search(r"training takes \d+ MiB at rank 4, and poor grants 1 MiB", here.said("poor"))
    assert "empty has no training examples" in here.said("empty")
    for said in (here.said("server"), here.status()):
        assert re.search(r"training takes \d+ MiB at rank 4, and poor grants 1 MiB", said)
        assert "empty has no training examples" in said
    assert "poor was refused" in here.said("server")
    assert "Turned away" in here.status()
    assert "fedft_clients_turned_away 2.0" in here.status("metrics")
    for name in ("poor", "empty"):  # the control: with memory and rows they may
        here.join(name)
    assert here.exit_code() == 0, here.logs
    assert here.counted(2) == ["empty", "poor"]


def test_an_own_rank_with_an_own_budget_trains_under_pruning(lab: Callable[..., Lab]) -> None:
    """Row 71: any exception about one client costs that client its place; this one is none any more."""
    here = lab(quorum=2, **{"per-round": 2, "deadline-s": 60})
    here.table["strategy"] = {"name": "hetlora"}
    here.table["pruning"] = {"selection": "cka"}
    here.serve("--wait-for", "2")
    here.join("whole")
    here.join("part", rank=2, memory_mib=least_mib(parse_config(here.table), 2))
    assert here.exit_code() == 0, here.logs
    assert here.counted(1) == here.counted(2) == ["part", "whole"]
    held = [record["pruning"]["held"] for record in here.rounds()]
    assert all(set(one) == {"part"} and len(one["part"]) == 1 for one in held)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--rank", "0"), "--rank 0 is no rank"),
        (("--rank=-3",), "--rank -3 is no rank"),
        (("--memory", "nan"), "--memory nan is no amount"),
        (("--memory", "-1"), "--memory -1 is no amount"),
        (("--memory", "inf"), "--memory inf is no amount"),
        (("--threads", "0"), "--threads 0 is no number"),
    ],
)
def test_what_is_no_rank_and_no_memory_is_refused_in_one_sentence(
    tmp_path: Path, tiny_data: Path, options: tuple[str, ...], rule: str
) -> None:
    from fedft.core.errors import ConfigError
    from tests.server.test_serve import here

    with pytest.raises(ConfigError, match=re.escape(rule)) as refused:
        here("join", tmp_path / "none.kit", "--data", tiny_data, *options)
    assert refused.value.exit_code == 2
    assert refused.value.what.count("\n") == 0


def test_time_is_not_lost_to_clients_that_were_never_coming(lab: Callable[..., Lab]) -> None:
    """`[rounds] gather-s`: with a quorum there, a round begins; its control waits for the third."""
    for gather in (1, 600):
        here = lab(f"gather-{gather}", **{"per-round": 3, "quorum": 2, "gather-s": gather})
        here.serve()
        until(lambda here=here: bool(here.status()))
        identity.invite(here.run_dir, "carol", here.folder / "carol.kit")
        here.join("ann")
        here.join("bob")
        if gather == 1:
            assert here.exit_code() == 0, here.logs
            assert here.counted(2) == ["ann", "bob"]
            continue
        waiting = re.compile(r"round 1: 2 of 3 connected; waiting for carol, \d+ s; gives up at")
        until(lambda here=here, waiting=waiting: waiting.search(here.status()) is not None)
        time.sleep(2.0)
        assert here.rounds() == []
