"""What every tracker has to hold to: a new one is a row of TRACKED, and needs no test of its own.

The same numbers as ``rounds.jsonl``, whatever a kill left behind; nothing written after the end; one
that fails neither ends a run nor is passed over in silence.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from fedft.core.errors import ConfigError, EnvironmentFailure, Interrupted
from fedft.core.record.lines import ClientLine, RoundLine, Summary
from fedft.core.record.rundir import RunDir
from fedft.server.config_file import parse_config
from fedft.server.run import resume, simulate
from fedft.trackers import TRACKERS, Start, Tracker, found, numbers
from fedft.trackers.run_directory import RunDirectory
from fedft.trackers.tensorboard import FOLDER, TensorBoard
from fedft.trackers.told import Told

Table = Callable[..., dict[str, Any]]
Curves = dict[int, dict[str, float]]
"""Round → path of a number → the number."""


def of_run_directory(run: Path) -> Curves:
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return {line["round"]: numbers(line) for line in lines}


def of_tensorboard(run: Path) -> Curves:
    """Read as TensorBoard itself does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "trackers" / FOLDER), {"tensors": 0})
    events.Reload()
    found: Curves = {}
    for tag in events.Tags()["tensors"]:
        if tag.split("/")[0] in ("config", "summary"):
            continue
        for event in events.Tensors(tag):
            told = found.setdefault(event.step, {})
            assert tag not in told, f"{tag} of round {event.step} is there twice"
            told[tag] = float(make_ndarray(event.tensor_proto))
    return found


@dataclass(frozen=True)
class Row:
    """How a tracker is made for a run, and how what it keeps is read back.

    Attributes:
        make: the tracker.
        read: what it shows of a run.
        behind: whether a kill can leave it with fewer rounds than were committed.
    """

    make: Callable[[RunDir], Tracker]
    read: Callable[[Path], Curves]
    behind: bool = True


TRACKED = {
    "run-directory": Row(RunDirectory, of_run_directory, behind=False),
    "tensorboard": Row(lambda run: TensorBoard(), of_tensorboard),
}


def test_every_tracker_is_held_to_the_laws() -> None:
    assert set(TRACKERS) <= set(TRACKED)


def some_line(round_: int, dice: random.Random) -> RoundLine:
    """A line with numbers that single precision cannot hold, and with whatever else lines have."""
    sites = [f"site-{k}" for k in range(dice.randrange(1, 5))]
    line: dict[str, Any] = {
        "round": round_,
        "cohort": sites,
        "failures": {"timeout": sites[:1]} if dice.random() < 0.3 else {},
        "train": {"loss": dice.choice([dice.random(), float("nan"), None, 1e300])},
        "bytes": {"up": dice.randrange(2**40), "down": dice.randrange(2**20)},
        "bias": {"relative": dice.random(), "cosine": None, "layers": {"a.0.b": {"relative": 1.0}}},
        "seconds": {"train": dice.random(), "commit": 1 / 3},
    }
    if dice.random() < 0.5:
        line["eval"] = {"loss": dice.random(), "accuracy": dice.random()}
    if dice.random() < 0.3:
        line["meters"] = {"of-a-stranger": {"deep": {"down": dice.random()}, "said": "text"}}
    return cast(RoundLine, line)


SUMMARY: Summary = {
    "status": "finished",
    "rounds": 9,
    "final": {"loss": 0.1},
    "best": None,
    "seconds": 1.0,
    "bytes": {"up": 1, "down": 2},
    "adapter_sha256": "ab",
}  # type: ignore[typeddict-item, assignment]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with RunDir.create(tmp_path / "run") as run:
        run.write_config("seed = 0\n")
        yield run


def start_of(run: RunDir, committed: Sequence[RoundLine]) -> Start:
    return Start(run.path, run.trackers, {"seed": 0}, committed)


@pytest.mark.parametrize("name", TRACKED)
@pytest.mark.parametrize("seed", range(8))
def test_a_run_that_was_killed_anywhere_ends_with_the_numbers_of_its_rounds(
    name: str, seed: int, run: RunDir
) -> None:
    """Told more than was committed, or less; several times over; the last process ends the run."""
    row, dice = TRACKED[name], random.Random(seed)
    lines = {r: some_line(r, dice) for r in range(1, 10)}
    committed = 0
    for _ in range(dice.randrange(1, 4)):
        tracker = row.make(run)
        tracker.started(start_of(run, [lines[r] for r in range(1, committed + 1)]))
        told = committed
        for round_ in range(committed + 1, dice.randint(committed, 9) + 1):
            tracker.round(lines[round_], [])
            told = round_
        # A round that is rolled back is run again, and comes out otherwise: seconds, noise.
        committed = dice.randint(committed, min(9, told + row.behind))
        for round_ in range(committed + 1, 10):
            lines[round_] = some_line(round_, dice)
    tracker = row.make(run)
    tracker.started(start_of(run, [lines[r] for r in range(1, committed + 1)]))
    for round_ in range(committed + 1, 10):
        tracker.round(lines[round_], [])
    tracker.finished(SUMMARY)
    tracker.close()
    assert row.read(run.path) == {round_: numbers(line) for round_, line in lines.items()}


@pytest.mark.parametrize("name", TRACKED)
def test_nothing_is_written_after_the_end(name: str, run: RunDir) -> None:
    row, dice = TRACKED[name], random.Random(1)
    tracker = row.make(run)
    tracker.started(start_of(run, []))
    tracker.round(some_line(1, dice), [])
    tracker.finished(SUMMARY)
    before = _bytes(run.path)
    with pytest.raises(RuntimeError):
        tracker.round(some_line(2, dice), [])
    tracker.note("late")
    tracker.close()
    tracker.close()
    assert _bytes(run.path) == before
    assert row.read(run.path).keys() == {1}


def _bytes(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TRACKED)
def test_a_round_is_on_disk_when_it_was_told(name: str, run: RunDir) -> None:
    tracker = TRACKED[name].make(run)
    tracker.started(start_of(run, []))
    line = some_line(1, random.Random(2))
    tracker.round(line, [])
    assert TRACKED[name].read(run.path) == {1: numbers(line)}
    tracker.close()


def test_numbers_by_hand() -> None:
    line: Any = {
        "round": 3,
        "cohort": ["a", "b"],
        "failures": {"timeout": ["b"], "nan": []},
        "train": {"loss": float("inf")},
        "bytes": {"up": 7, "down": 0},
        "eval": {"accuracy": 0.5},
        "bias": {"relative": None, "layers": {"q": {"relative": 1.0}}},
        "spectrum": {"q": [1.0]},
        "seconds": {"train": 0.25},
        "odd": True,
        "word": "x",
    }
    assert numbers(line) == {
        "cohort": 2.0,
        "failures/timeout": 1.0,
        "failures/nan": 0.0,
        "bytes/up": 7.0,
        "bytes/down": 0.0,
        "eval/accuracy": 0.5,
        "seconds/train": 0.25,
    }


# ── failing ───────────────────────────────────────────────────────────────────────────────────


class Heard(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.notes: list[str] = []

    def started(self, start: Start) -> None:
        self.calls.append("started")

    def round(self, line: RoundLine, replies: Sequence[ClientLine]) -> None:
        self.calls.append(f"round {line['round']}")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finished(self, summary: Summary) -> None:
        self.calls.append("finished")

    def close(self) -> None:
        self.calls.append("close")


class Broken(Heard):
    """Hears, and fails in one kind of call."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def __getattribute__(self, name: str) -> Any:
        call = super().__getattribute__(name)
        if name != super().__getattribute__("__dict__").get("_where"):
            return call

        def failing(*told: Any) -> None:
            call(*told)
            raise OSError("no room")

        return failing


WHOLE = ["started", "round 1", "round 2", "finished", "close"]


@pytest.mark.parametrize("where", ["started", "round", "note", "finished", "close"])
@pytest.mark.parametrize("first", [True, False])
def test_one_that_fails_is_told_once_and_costs_the_others_nothing(
    where: str, first: bool, run: RunDir
) -> None:
    broken, heard, dice = Broken(where), Heard(), random.Random(0)
    told = Told([broken, heard] if first else [heard, broken])
    told.started(start_of(run, []))
    for round_ in (1, 2):
        told.round(some_line(round_, dice), [])
        told.note(f"note {round_}")
    told.finished(SUMMARY)
    told.close()
    told.close()
    assert heard.calls == WHOLE
    complaints = [note for note in heard.notes if "Broken failed" in note and "no room" in note]
    assert len(complaints) == (where != "close")  # who is closed hears nothing more
    assert [note for note in heard.notes if note.startswith("note")] == ["note 1", "note 2"]
    assert broken.calls == (["started", "close"] if where == "started" else WHOLE)
    assert told.failures["Broken"] == {"round": 2, "note": 3}.get(where, 1)


def test_two_that_fail_over_each_other_s_failure_end() -> None:
    told = Told([Broken("note"), Broken("note")])
    told.note("something")
    assert told.failures["Broken"] >= 2


def test_none_that_fails_is_counted_as_failing(run: RunDir) -> None:
    """The control."""
    told = Told([Heard()])
    told.started(start_of(run, []))
    told.finished(SUMMARY)
    assert not told.failures


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_process_is_no_failure_of_a_tracker(end: type[BaseException]) -> None:
    class Ends(Tracker):
        def note(self, text: str) -> None:
            raise end

    with pytest.raises(end):
        Told([Ends()]).note("x")


def test_the_end_is_told_once(run: RunDir) -> None:
    told = Told([heard := Heard()])
    told.finished(SUMMARY)
    for late in (lambda: told.finished(SUMMARY), lambda: told.round(some_line(1, random), [])):  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            late()
    assert heard.calls == ["finished"]


# ── whole runs ────────────────────────────────────────────────────────────────────────────────


def test_a_paused_run_goes_on_to_the_same_numbers_and_bytes(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any]
) -> None:
    """Named trackers and one from Python; a broken one changes no bit of the run."""
    table = tiny_table(track={"trackers": ["tensorboard"]})
    plain = simulate(parse_config(tiny_table()), tmp_path / "plain")
    stop, broken, heard = stop_after(2), Broken("round"), Heard()
    with pytest.raises(Interrupted):
        simulate(parse_config(table), tmp_path / "run", trackers=[stop, broken], stop=stop)
    run = resume(tmp_path / "run", trackers=[heard, broken])
    assert of_tensorboard(run.path) == of_run_directory(run.path)
    assert of_run_directory(run.path).keys() == {1, 2, 3, 4}
    assert heard.calls == ["started", "round 3", "round 4", "finished", "close"]
    ours, theirs = plain.summary(), run.summary()
    assert ours is not None and theirs is not None
    assert theirs.get("history_sha256") == ours.get("history_sha256")


def test_trackers_can_be_left_out_when_a_run_goes_on(
    tiny_table: Table, tmp_path: Path, stop_after: Callable[[int], Any]
) -> None:
    table = tiny_table(track={"trackers": ["tensorboard"]})
    stop = stop_after(1)
    with pytest.raises(Interrupted):
        simulate(parse_config(table), tmp_path / "run", trackers=[stop], stop=stop)
    resume(tmp_path / "run", changed=parse_config(tiny_table()))
    assert of_tensorboard(tmp_path / "run").keys() == {1}


_KILLED = """
import json, os, sys
from pathlib import Path
from fedft.server.config_file import parse_config
from fedft.server.run import simulate
from fedft.trackers import Tracker

class Kills(Tracker):
    def round(self, line, replies):
        if line["round"] == 3:
            os._exit(9)

simulate(parse_config(json.loads(sys.argv[1])), Path(sys.argv[2]), trackers=[Kills()])
"""


@pytest.mark.crash
def test_a_killed_run_goes_on_to_the_same_numbers(tiny_table: Table, tmp_path: Path) -> None:
    """The process dies when round 3 is committed and TensorBoard has not heard of it."""
    table = json.dumps(tiny_table(track={"trackers": ["tensorboard"]}))
    done = subprocess.run([sys.executable, "-c", _KILLED, table, str(tmp_path / "run")])
    assert done.returncode == 9
    assert of_tensorboard(tmp_path / "run").keys() == {1, 2}
    assert of_run_directory(tmp_path / "run").keys() == {1, 2, 3}
    resume(tmp_path / "run")
    assert of_tensorboard(tmp_path / "run") == of_run_directory(tmp_path / "run")
    assert of_run_directory(tmp_path / "run").keys() == {1, 2, 3, 4}


def test_a_name_that_is_none_is_refused_with_those_that_are_near(tiny_table: Table) -> None:
    with pytest.raises(ConfigError, match="tensorbord") as refused:
        parse_config(tiny_table(track={"trackers": ["tensorbord"]}))
    assert "tensorboard" in str(refused.value)
    with pytest.raises(ConfigError, match="named twice"):
        parse_config(tiny_table(track={"trackers": ["tensorboard", "tensorboard"]}))
    assert found("tensorboard") is TensorBoard


def test_without_its_package_nothing_is_begun(
    tiny_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedft.core.extras.find_spec", lambda name: None)
    table = parse_config(tiny_table(track={"trackers": ["tensorboard"]}))
    with pytest.raises(EnvironmentFailure, match=r"tensorboard is not installed") as refused:
        simulate(table, tmp_path / "run")
    assert "fedft[trackers]" in str(refused.value)
    assert not (tmp_path / "run").exists()
