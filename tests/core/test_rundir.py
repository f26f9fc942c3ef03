"""The run directory: one writer, nothing overwritten, nothing half-written taken for whole."""

import hashlib
import importlib.metadata
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedft.core.digest import adapter_digest, state_digest
from fedft.core.errors import ConfigError, EnvironmentFailure, IntegrityError, SecurityRefusal
from fedft.core.files import write_file
from fedft.core.record import environment
from fedft.core.record.jsonl import plain
from fedft.core.record.rundir import RunDir, child
from fedft.core.types import Adapter, Factors, ServerState


@pytest.fixture
def run(tmp_path: Path):
    with RunDir.create(tmp_path / "run") as run:
        run.write_config("seed = 0\n")
        yield run


def filled(run: RunDir, rounds: int) -> RunDir:
    for round in range(1, rounds + 1):
        for site in ("a", "b"):
            run.append_client({"round": round, "site": site})
        run.append_round({"round": round, "eval": {"loss": 1 / round}})
    return run


# Creating and opening.


def test_default_folders_are_dated_and_never_shared(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [RunDir.create(hint="lora-fair") for _ in range(3)]
    assert len({r.path for r in runs}) == 3
    for r in runs:
        assert r.path.parent == tmp_path / "runs"
        assert "-lora-fair" in r.path.name
        assert r.path.is_absolute()
        r.close()


def test_an_existing_run_is_never_overwritten(run: RunDir):
    run.close()
    with pytest.raises(ConfigError, match="not empty") as error:
        RunDir.create(run.path)
    assert "fedft resume" in error.value.fix
    assert RunDir.open(run.path).config == "seed = 0\n"


def test_a_run_that_died_before_its_config_can_be_made_again(tmp_path: Path):
    RunDir.create(tmp_path / "run").close()
    with pytest.raises(ConfigError, match="no config"):
        RunDir.open(tmp_path / "run")
    RunDir.create(tmp_path / "run").close()


def test_a_folder_without_a_run_is_refused_and_left_as_it_is(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDir.open(tmp_path, writing=True)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_layout_is_refused_with_both_versions(run: RunDir):
    run.write_environment({}, {"schema": 7})
    with pytest.raises(EnvironmentFailure, match=r"format 7.*up to 1"):
        RunDir.open(run.path)


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "", ".", "..", ".hidden", "a\0", "ä", "-x", "a" * 129]
)
def test_names_that_could_lead_elsewhere_are_refused(tmp_path: Path, name: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SecurityRefusal) as error:
        child(tmp_path, name)
    assert error.value.exit_code == 7
    if "/" in name:
        with pytest.raises(SecurityRefusal):
            RunDir.create(hint=name)
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_is_refused_where_a_name_came_from_outside(tmp_path: Path):
    (tmp_path / "site").symlink_to("/tmp")
    with pytest.raises(SecurityRefusal, match="symbolic link"):
        child(tmp_path, "site")
    assert child(tmp_path, "site-2") == tmp_path / "site-2"


def test_a_planted_link_is_not_written_through(run: RunDir, tmp_path: Path):
    target = tmp_path / "target"
    target.write_text("precious")
    (run.path / ".summary.json.tmp").symlink_to(target)
    with pytest.raises(EnvironmentFailure, match=r"summary\.json"):
        run.write_summary({"status": "done"})
    assert target.read_text() == "precious"


# One writer.


def test_the_second_writer_is_refused_with_the_pid_of_the_first(run: RunDir):
    with pytest.raises(EnvironmentFailure, match=f"pid {os.getpid()}"):
        RunDir.open(run.path, writing=True)
    assert RunDir.open(run.path).config  # readers are free
    run.close()
    RunDir.open(run.path, writing=True).close()


def test_the_lock_of_a_dead_process_is_taken_over_even_if_its_children_live(run: RunDir):
    run.close()
    # The holder is killed; a child that it forked lives on.
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from fedft.core.record.rundir import RunDir\n"
        "run = RunDir.open(Path(sys.argv[1]), writing=True)\n"
        "child = os.fork()\n"  # safe: that interpreter is fresh, and the child only reads
        "if not child:\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "time.sleep(0.2)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(EnvironmentFailure, match=f"pid {holder.pid}"):
            RunDir.open(run.path, writing=True)
        holder.kill()
        holder.wait()
        RunDir.open(run.path, writing=True).close()


def test_a_reader_cannot_write(run: RunDir):
    reader = RunDir.open(run.path)
    for act in (
        lambda: reader.append_round({"round": 1}),
        lambda: reader.append_client({"round": 1}),
        lambda: reader.truncate_to(0),
        lambda: reader.write_summary({}),
        lambda: reader.write_config(""),
        lambda: reader.write_environment({}),
    ):
        with pytest.raises(RuntimeError, match="open for reading"):
            act()


# The growing record.


def test_lines_come_back(run: RunDir):
    filled(run, 3)
    reader = RunDir.open(run.path)
    assert [r["round"] for r in reader.rounds()] == [1, 2, 3]
    assert reader.rounds()[1]["eval"] == {"loss": 0.5}
    assert [(c["round"], c["site"]) for c in reader.clients()] == [
        (r, s) for r in (1, 2, 3) for s in "ab"
    ]


def test_what_is_no_number_is_null_and_what_is_no_json_is_an_error(run: RunDir):
    record = {"round": 1, "x": [float("nan"), float("-inf"), (1, 2.5)], "t": True, "n": None}
    run.append_round(record)
    assert run.rounds() == [{"round": 1, "x": [None, None, [1, 2.5]], "t": True, "n": None}]
    for bad in (torch.tensor(1.0), {1}, b"x", object()):
        with pytest.raises(TypeError, match=r"record\.eval\.loss"):
            run.append_round({"round": 2, "eval": {"loss": bad}})
    with pytest.raises(TypeError, match="keys of JSON"):
        run.append_round({"round": 2, "eval": {1: 2}})
    for bad in (None, 1.0, True, "1"):
        with pytest.raises(TypeError, match="needs its round"):
            run.append_round({"round": bad})
    assert len(run.rounds()) == 1
    assert plain({"a": ()}) == {"a": []}


def test_no_control_character_reaches_a_terminal(run: RunDir):
    text = "\x1b[31m<script>\x07\x7f\x9b\n\u2028\ud800"
    run.append_client({"round": 1, "text": text})
    raw = (run.path / "clients.jsonl").read_bytes()
    assert all(0x20 <= byte < 0x7F for byte in raw[:-1])
    assert next(run.clients())["text"] == text


@pytest.mark.parametrize(
    "torn", [b'{"round": 4, "ev', b"\0" * 40, b'{"round": 4}', b"\0" * 9 + b"\n"]
)
def test_what_a_crash_left_at_the_end_is_ignored_and_then_removed(run: RunDir, torn: bytes):
    filled(run, 3).close()
    for name in ("rounds.jsonl", "clients.jsonl"):
        with (run.path / name).open("ab") as file:
            file.write(torn)
    assert len(RunDir.open(run.path).rounds()) == 3
    with RunDir.open(run.path, writing=True) as again:
        again.truncate_to(3)
        again.append_client({"round": 4, "site": "a"})
        again.append_round({"round": 4})
        assert [r["round"] for r in again.rounds()] == [1, 2, 3, 4]
        assert [c["round"] for c in again.clients()] == [1, 1, 2, 2, 3, 3, 4]
    assert b"\0" not in (run.path / "rounds.jsonl").read_bytes()


def test_a_torn_line_is_cut_before_the_next_is_added(run: RunDir):
    filled(run, 1).close()
    with (run.path / "rounds.jsonl").open("ab") as file:
        file.write(b'{"rou')
    with RunDir.open(run.path, writing=True) as again:
        again.append_round({"round": 2})
        assert [r["round"] for r in again.rounds()] == [1, 2]


def test_resuming_drops_what_was_not_committed_and_no_other_byte(run: RunDir):
    filled(run, 2)
    before = {n: (run.path / n).read_bytes() for n in ("rounds.jsonl", "clients.jsonl")}
    run.append_client({"round": 3, "site": "a"})
    run.append_round({"round": 3})
    run.append_client({"round": 4, "site": "a"})
    run.truncate_to(2)
    assert {n: (run.path / n).read_bytes() for n in before} == before
    stamps = {n: (run.path / n).stat().st_mtime_ns for n in before}
    run.truncate_to(2)
    assert {n: (run.path / n).stat().st_mtime_ns for n in before} == stamps
    run.truncate_to(0)
    assert run.rounds() == list(run.clients()) == []


def test_damage_in_the_middle_is_an_error_that_names_the_line(run: RunDir):
    filled(run, 3)
    path = run.path / "rounds.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    for act in (run.rounds, lambda: run.truncate_to(3)):
        with pytest.raises(IntegrityError, match=r"rounds\.jsonl, line 2"):
            act()
    run.truncate_to(1)  # the damage lies in what was never committed
    assert path.read_bytes() == lines[0]


def test_a_full_disk_leaves_no_half_line(run: RunDir):
    filled(run, 1)
    before = (run.path / "rounds.jsonl").read_bytes()
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from fedft.core.errors import EnvironmentFailure\n"
        "from fedft.core.record.rundir import RunDir\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run = RunDir.open(Path(sys.argv[1]), writing=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        "for act in (run.append_round, run.write_summary):\n"
        "    try:\n"
        "        act({'round': 2, 'text': 'x' * 1000})\n"
        "    except EnvironmentFailure as error:\n"
        "        print(error.exit_code, error.what)\n"
    )
    run.close()
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first.startswith(f"3 cannot write {run.path / 'rounds.jsonl'}: File too large")
    assert second.startswith(f"3 cannot write {run.path / 'summary.json'}: File too large")
    assert (run.path / "rounds.jsonl").read_bytes() == before
    assert not list(run.path.glob(".*.tmp"))
    assert not run.finished


# Config, environment, summary.


def test_the_environment_says_what_the_run_started_on(run: RunDir):
    run.write_environment({"base_model": "ab"}, {"device": "cpu"})
    env = RunDir.open(run.path).environment()
    assert env["versions"]["torch"] == importlib.metadata.version("torch")
    assert env["hashes"] == {"base_model": "ab"}
    assert env["device"] == "cpu"
    assert env["schema"] == 1
    assert env["argv"] == sys.argv
    assert env["python"].startswith("3.")
    assert run.changed_versions() == {}


def test_versions_are_read_without_importing_the_libraries():
    code = (
        "import sys; from fedft.core.record.environment import surroundings; r = surroundings();"
        "assert r['versions']['torch'];"
        "assert not {'torch', 'ray', 'flwr', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_another_version_of_torch_is_seen(run: RunDir, monkeypatch):
    run.write_environment({})
    monkeypatch.setattr(environment, "version", lambda name: "0.1" if name == "torch" else None)
    changed = run.changed_versions()
    assert changed["torch"][1] == "0.1"
    assert changed["torch"][0] != "0.1"


def test_git_state_is_of_the_repository_that_tracks_the_source(tmp_path: Path, monkeypatch):
    def git(*command: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "environment.py"
    source.write_text("1\n")
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment.git_state() is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert environment.git_state() is None  # installed inside somebody else's repository
    git("add", "environment.py")
    git("commit", "-m", "second")
    state = environment.git_state()
    assert state is not None
    assert (len(state["commit"]), state["dirty"]) == (40, False)
    source.write_text("2\n")
    assert environment.git_state() == {"commit": state["commit"], "dirty": True}


def test_a_run_is_finished_when_its_summary_stands(run: RunDir):
    assert not run.finished
    assert run.summary() is None
    run.write_summary({"status": "done", "final": {"loss": float("nan")}})
    assert run.finished
    assert RunDir.open(run.path).summary() == {"status": "done", "final": {"loss": None}}
    (run.path / "summary.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"summary\.json is damaged"):
        run.summary()


def test_adapters_are_found_by_round(run: RunDir):
    assert run.exported() == []
    for round in (20, 5, 12345):
        run.adapter(round).mkdir(parents=True)
    (run.adapters / "other").mkdir()
    assert run.adapter(20).name == "round-0020"
    assert run.exported() == [5, 20, 12345]


def test_a_file_is_replaced_whole(tmp_path: Path):
    write_file(tmp_path / "f", b"one")
    write_file(tmp_path / "f", b"")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"")]
    with pytest.raises(EnvironmentFailure, match="absent"):
        write_file(tmp_path / "absent" / "f", b"")


# Digests.


def make_state() -> ServerState:
    A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
    adapter = Adapter({"m": Factors(A, B, 2.0), "k": Factors(A, B, 2.0)}, {"head": torch.ones(2)})
    return ServerState(adapter, 3, {"m": Factors(A, B, 1.0)}, {"v": torch.ones(2)})


def test_digests_are_of_the_values_and_not_of_order_or_layout():
    state = make_state()
    factors = dict(reversed(state.adapter.factors.items()))
    strided = {m: replace(f, A=f.A.T.contiguous().T) for m, f in factors.items()}
    other = replace(state, adapter=state.adapter.map_factors(strided), round=4)
    assert state_digest(other) == state_digest(state)


def test_the_digest_is_the_documented_stream():
    """Spelled out by hand: a change of it makes every stored digest worthless."""
    A, B = struct.pack("<6f", *range(6)), struct.pack("<8f", *range(8))
    factors = [b"", (2).to_bytes(8, "big")]
    factors += [b"A", b"torch.float32 [2, 3]", A, b"B", b"torch.float32 [4, 2]", B]
    ones = [b"torch.float32 [2]", struct.pack("<2f", 1, 1)]
    one, two = (count.to_bytes(8, "big") for count in (1, 2))
    fields = [b"adapter", two, b"k", b"0x1.0000000000000p+1", *factors]
    fields += [b"m", b"0x1.0000000000000p+1", *factors]
    fields += [b"head", one, b"head", *ones]
    fields += [b"delta", one, b"m", b"0x1.0000000000000p+0", *factors]
    adapter = hashlib.sha256(b"".join(len(f).to_bytes(8, "big") + f for f in fields)).hexdigest()
    fields += [b"slots", one, b"v", *ones]
    whole = hashlib.sha256(b"".join(len(f).to_bytes(8, "big") + f for f in fields)).hexdigest()
    state = make_state()
    assert (adapter_digest(state.adapter, state.delta), state_digest(state)) == (adapter, whole)


def test_digests_see_every_kind_of_change():
    state = make_state()
    adapter, f = state.adapter, state.adapter.factors["m"]

    def with_m(**change: object) -> ServerState:
        return replace(
            state, adapter=adapter.map_factors({**adapter.factors, "m": replace(f, **change)})
        )

    changed = [
        state,
        with_m(A=f.A * -1.0),
        with_m(B=f.B + 1e-6),
        with_m(A=f.A.double()),
        with_m(scale=2.0000000000000004),
        with_m(R=torch.eye(2)),
        replace(state, adapter=replace(adapter, head={"head": torch.ones(2, 1)})),
        replace(state, adapter=replace(adapter, head={"heat": torch.ones(2)})),
        replace(state, delta={}),
        replace(state, delta={"k": state.delta["m"]}),
        replace(state, slots={}),
        replace(state, slots={"v": torch.ones(2, dtype=torch.int32)}),
        replace(state, slots={"v": torch.tensor([1.0, -0.0])}),
        replace(state, slots={"v": torch.tensor([1.0, 0.0])}),
    ]
    assert len({state_digest(s) for s in changed}) == len(changed)
    # The adapter's digest leaves the slots out, and nothing else.
    digests = [adapter_digest(s.adapter, s.delta) for s in changed]
    assert len(set(digests)) == len(changed) - 4
    assert digests[0] == digests[-1]
    assert adapter_digest(adapter) == adapter_digest(adapter, {}) != digests[0]


def test_a_config_that_is_no_text_is_damage(run: RunDir):
    run.write_config("# ü\n")
    assert run.config == "# ü\n"
    (run.path / "config.toml").write_bytes(b"\xff")
    with pytest.raises(IntegrityError, match=r"config\.toml is damaged"):
        _ = run.config


def test_json_files_are_readable_by_eye(run: RunDir):
    run.write_environment({"a": "b"})
    text = (run.path / "environment.json").read_text()
    assert json.loads(text)["hashes"] == {"a": "b"}
    assert text.count("\n") > 5
