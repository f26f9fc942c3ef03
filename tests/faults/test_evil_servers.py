"""Row 72 with real processes over mutual TLS: a server that lies, and what it has of its clients.

Of two clients one is asked what its policy, or its file, does not give; the other, which allows it,
is the control.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedft.clients.own import Own
from fedft.clients.policy import Policy
from fedft.clients.worker import Site
from fedft.core.record.rundir import RunDir
from fedft.server.config_file import parse_config
from tests.faults import evil_servers
from tests.faults.test_participation import QUICK, read
from tests.server.stage import Stage

pytestmark = pytest.mark.grpc

SECRETS = ("078-05-1120", "hiv-positive", "their-folder")
ROUNDS = {"count": 2, "per-round": 2, "quorum": 1, "evaluate-every": 10, "gather-s": 20}


@pytest.fixture
def data(tmp_path: Path, tiny_data: Path) -> Path:
    folder = tmp_path / "their-folder"
    folder.mkdir()
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()[:40]]
    for row in rows:
        row |= {"ssn": "078-05-1120", "finding": row["label"]}
    rows.append({"text": "leaf", "label": "hiv-positive", "finding": "plant", "ssn": "078-05-1120"})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def play(
    stage: Callable[..., Stage],
    table: Any,
    how: Any,
    about: tuple[Any, ...],
    sites: dict[str, Site],
) -> tuple[Stage, dict[str, str]]:
    """A run of a lying server; what each client said at its end."""
    from tests.faults.misbehaving import client

    here = stage(parse_config(table), patience_s=60.0)
    arguments = (how, about, here.config, here.run_dir, here.hosting)
    here.server = here.processes.Process(target=evil_servers.lie, args=arguments, daemon=True)
    here.server.start()
    for name, site in sites.items():
        here.invite(name)
        options = {
            key: getattr(site, key) for key in ("model", "own", "policy", "send_details")
        } | {"ledger": here.folder / f"ledger-{name}"}
        files = (here.folder / f"{name}.kit", site.data, here.folder / name)
        log = here.folder / f"{name}.log"
        process = here.processes.Process(
            target=client, args=("good", *files, QUICK, log, options), daemon=True
        )
        process.start()
        here.clients[name] = process
    here.server.join(150)
    assert here.server.exitcode == 0
    for process in here.clients.values():
        process.join(30)
    return here, {name: (here.folder / f"{name}.log").read_text() for name in sites}


def told(here: Stage, *texts: str) -> list[str]:
    """Which of the texts stand in any file of the run."""
    files = [path.read_bytes() for path in here.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [text for text in texts if any(text.encode() in content for content in files)]


def test_noise_that_is_taken_out_of_the_plans(
    stage: Callable[..., Stage], tiny_table: Callable[..., Any], tiny_data: Path, tiny_model: Path
) -> None:
    dp = {"noise-multiplier": 1.5, "max-grad-norm": 0.5}
    table = tiny_table(
        fleet={"clients": 2},
        rounds=ROUNDS,
        strategy={"name": "ffa-lora"},
        training={"steps": 2, "dp": dp},
    )
    open_ = Site(tiny_data, model=str(tiny_model))
    strict = replace(open_, policy=Policy(least_noise=1.0, most_epsilon=50.0))
    sites = {"strict": strict, "open": open_}
    here, said = play(stage, table, evil_servers.strips_the_noise, ({"dp_noise": 0.0},), sites)
    lines = [line for line in RunDir.open(here.run_dir).clients() if line["kind"] == "train"]
    by_name = {
        name: [x for x in lines if x["site"] == name and x["status"] == "ok"] for name in sites
    }
    assert not by_name["strict"] and len(by_name["open"]) == 2
    assert said["strict"].count("the plan has no noise; the policy of this client") == 2
    assert told(here, "its policy wants more privacy than the plan gives (privacy)")
    assert not told(here, "least-noise", "the plan has no noise")
    assert not list((here.folder / "ledger-strict").glob("*.jsonl")), "nothing left"
    assert list((here.folder / "ledger-open").glob("*.jsonl"))


def test_columns_and_rows_that_are_nobodys_business(
    stage: Callable[..., Stage],
    tiny_table: Callable[..., Any],
    data: Path,
    tiny_model: Path,
) -> None:
    table = tiny_table(fleet={"clients": 2}, rounds=ROUNDS, training={"steps": 2})
    shut = Site(data, model=str(tiny_model))
    sites = {
        "shut": shut,
        "open": replace(shut, own=Own(label="finding")),
        "chatty": replace(shut, send_details=True),
    }
    lie = ({"label": "ssn", "text": "ssn", "skip_bad": True}, ())
    here, said = play(stage, table, evil_servers.asks_about, lie, sites)
    kept = [line for line in RunDir.open(here.run_dir).clients() if line["status"] == "ok"]
    assert {line["site"] for line in kept} == {"open"}, "positive control: its own columns fit"
    assert "'hiv-positive' is none of the 3 classes" in said["shut"], "its user reads it"
    assert "--label ssn" in said["shut"]
    reasons = [line["why"] for line in read(here.run_dir / "audit.jsonl") if line["who"] == "shut"]
    assert "its data do not fit the task (data)" in " ".join(reasons)
    mine = [line for line in read(here.run_dir / "audit.jsonl") if line["who"] != "chatty"]
    assert not [secret for secret in SECRETS if secret in json.dumps(mine)]
    # The search finds what an operator lets out, and nothing else is in any file of the run.
    assert told(here, *SECRETS) == ["hiv-positive", "their-folder"]
