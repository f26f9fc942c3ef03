"""Real clients with trainers of their own: real processes, real commands, mutual TLS."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import fedft
from fedft.server import identity
from tests.clients.trainers.conftest import EXAMPLES, client_lines
from tests.server.stage import until

pytestmark = [pytest.mark.grpc, pytest.mark.timeout(900)]

Table = Callable[..., dict[str, Any]]
CODE = """
from pathlib import Path
with Path(__file__).with_name("imports").open("a") as log:
    log.write("x")
from tests.clients.trainers.own_trainers import Loop

def make_trainer(model, rows, settings):
    return Loop(model, rows, settings)

def at_one(model, rows, settings):
    if settings.client == "bad":
        raise RuntimeError(f"the row says {rows[0]['text']!r}")
    return Loop(model, rows, settings)
"""


class Site:
    """A server and its clients, each a command of its own, each in a folder with the user's modules."""

    def __init__(self, folder: Path, table: dict[str, Any], data: Path) -> None:
        self.folder, self.table, self.data = folder, table, data
        self.run_dir = folder / "run"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: object) -> None:
        here = self.folder / name
        here.mkdir()
        (here / "their_code.py").write_text(CODE)
        shutil.copy(EXAMPLES / "train.py", here / "their_sft.py")
        environment = {**os.environ, "PYTHONPATH": str(Path(fedft.__file__).parents[1])}
        with (here / "log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedft", *map(str, arguments)],
                cwd=here,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def serve(self, clients: int) -> None:
        config = self.folder / "config.toml"
        config.write_text(tomli_w.dumps(self.table))
        arguments = ["serve", config, "--run-dir", self.run_dir, "--wait-for", clients]
        self.start("server", *arguments, "--linger", "10")
        address = self.run_dir / "identity" / "address.json"
        until(lambda: address.exists() or self.code("server") is not None, 120)
        assert address.exists(), self.said("server")

    def join(self, name: str, *options: object) -> None:
        kit = self.folder / f"{name}.kit"
        identity.invite(self.run_dir, name, kit)
        own = ["--site-dir", self.folder / f"{name}-site", "--model", self.table["model"]["source"]]
        self.start(name, "join", kit, "--data", self.data, *own, "--threads", 1, *options)

    def code(self, name: str) -> int | None:
        return self.processes[name].poll()

    def ends(self, name: str, seconds: float = 400) -> int:
        return self.processes[name].wait(seconds)

    def said(self, name: str) -> str:
        return (self.folder / name / "log").read_text()

    def imports(self, name: str) -> int:
        log = self.folder / name / "imports"
        return len(log.read_text()) if log.exists() else 0


@pytest.fixture
def site(tmp_path: Path, tiny_table: Table, tiny_data: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(trainer: str, table: dict[str, Any] | None = None) -> Site:
        table, data = (tiny_table(), tiny_data) if table is None else (table, None)
        rounds = {"count": 2, "per-round": 2, "quorum": 1, "evaluate-every": 2, "gather-s": 2}
        table["rounds"] = {**rounds, "deadline-s": 400}
        table["training"] = {"batch-size": 16, "lr": 1e-2, "trainer": trainer}
        made.append(Site(tmp_path, table, data or Path(table["data"]["source"])))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(10)


def test_a_client_trains_by_the_name_that_its_policy_has_and_another_is_refused(
    site: Callable[..., Site],
) -> None:
    """The server sends the name; who has not named it imports nothing, and both sides are told."""
    name = "their_code:make_trainer"
    here = site(name)
    here.serve(2)
    here.join("no-policy")
    (here.folder / "policy.toml").write_text('trainers = ["their_code:at_one"]\n')
    here.join("other-policy", "--policy", here.folder / "policy.toml")
    for refused in ("no-policy", "other-policy"):
        assert here.ends(refused) == 7, here.said(refused)
        assert f"the run trains by {name!r}, which the policy of this client does not name" in (
            here.said(refused)
        )
        assert "fedft join --trainer MODULE:FUNCTION" in here.said(refused)
    assert here.imports("no-policy") == 0  # nor did it look for it
    told = "its policy does not name the trainer of this run (trainer)"
    until(lambda: here.said("server").count(told) >= 2)
    here.join("ann", "--trainer", name)
    here.join("bob", "--trainer", name)
    assert here.ends("server") == 0, here.said("server")
    run = fedft.Run(here.run_dir)
    assert [line["failures"] for line in run.rounds] == [{}, {}]
    counted = [line for line in client_lines(run) if line["status"] == "ok"]
    assert sorted(line["site"] for line in counted) == ["ann", "ann", "bob", "bob"]
    for line in counted:
        assert line["steps"] == -(-line["examples"] // 16) and line["loss"] > 0
    assert here.imports("ann") == here.imports("bob") == 1
    for name in ("ann", "bob"):  # whose data, and so whose ledger, are the same
        assert here.ends(name) == 0, here.said(name)
        infinite = re.findall(r"ε = ∞ over \d+ results?, \d+ of them without", here.said(name))
        assert len(infinite) == 1


def test_what_fails_at_one_client_is_told_there_with_its_line_and_ends_no_round(
    site: Callable[..., Site],
) -> None:
    name = "their_code:at_one"
    here = site(name)
    here.serve(2)
    here.join("good", "--trainer", name)
    here.join("bad", "--trainer", name)
    assert here.ends("server") == 0, here.said("server")
    lines = client_lines(fedft.Run(here.run_dir))
    assert {line["status"] for line in lines if line["site"] == "good"} == {"ok"}
    bad = [line for line in lines if line["site"] == "bad"]
    assert bad and all(line["status"] == "error" for line in bad)
    line = (
        CODE.splitlines().index(
            textwrap.indent('raise RuntimeError(f"the row says', " " * 8)
            + " {rows[0]['text']!r}\")"
        )
        + 1
    )
    assert f"their_code.py:{line} in at_one: RuntimeError: the row says" in here.said("bad")
    server = here.said("server") + "".join(map(str, bad))
    assert "the row says" not in server and "their_code.py" not in server  # it quotes the data
    assert all("the trainer of this run failed there (training)" in x["reason"] for x in bad)


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
def test_an_sfttrainer_trains_at_real_clients(
    site: Callable[..., Site], chat_table: dict[str, Any]
) -> None:
    """The right answer is the same for all: its perplexity falls below that of the base."""
    name = "their_sft:make_trainer"
    here = site(name, chat_table)
    here.serve(2)
    columns = ["--prompt", "question", "--answer", "answer"]
    here.join("ann", "--trainer", name, *columns)
    here.join("bob", "--trainer", name, *columns)
    assert here.ends("server") == 0, here.said("server")
    run = fedft.Run(here.run_dir)
    assert [line["failures"] for line in run.rounds] == [{}, {}], here.said("ann")
    lines = client_lines(run)
    assert {line["status"] for line in lines} == {"ok"}
    assert sorted(line["site"] for line in lines) == ["ann", "ann", "bob", "bob"]
    assert all(line["steps"] == 4 and line["loss"] > 0 for line in lines)
    assert run.metrics["final"]["perplexity"] < 11  # of eleven words, at random
    assert here.ends("ann") == here.ends("bob") == 0, here.said("ann") + here.said("bob")
