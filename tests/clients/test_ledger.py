"""A client's own ledger: it never under-counts, whatever is killed, torn, renamed or stripped."""

import contextlib
import json
import math
import os
import random
import signal
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedft.cli import cli
from fedft.clients.join import KeptParts
from fedft.clients.ledger import Account, Ledger, Release, ledgers, release_of, usable
from fedft.clients.policy import Policy
from fedft.clients.work import Failure
from fedft.clients.worker import Resident, Site
from fedft.core import models
from fedft.core.data.rowkeys import Keys
from fedft.core.errors import EnvironmentFailure
from fedft.core.link.framing import Ticket, data_schema
from fedft.core.privacy.accounting import example_epsilon
from fedft.core.spec import DataSpec, LoraSpec, ModelSpec, TaskSpec
from fedft.core.types import Adapter, EvalPlan, LocalTraining, TrainPlan
from fedft.core.wire import codec
from tests.forks import Forks

DATA: Keys = np.arange(10, 30, dtype=np.uint64)
ONE = Release("dp-sgd", 1.1, 0.25, 3, run="first", round=1)
STRONG = Release("dp-sgd", 0.7, 0.5, 9, run="first", round=2)
PLAIN = Release("none", run="first", round=3)


def epsilon(*releases: Release) -> float:
    """The account by hand."""
    counts: dict[tuple[float, float], int] = {}
    for r in releases:
        key = (r.noise_multiplier, r.rate)
        counts[key] = counts.get(key, 0) + r.steps
    return example_epsilon([(z, q, n) for (z, q), n in sorted(counts.items())], 1e-5)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger", DATA)


# ── adding up ─────────────────────────────────────────────────────────────────────────────────


def test_it_adds_up_over_runs_rounds_and_restarts(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.account() == Account() and ledger.account().epsilon() == 0
    assert not (tmp_path / "ledger").exists(), "looking makes no file"
    entered: list[Release] = []
    for k in range(4):
        release = replace([ONE, STRONG][k % 2], run=f"run-{k}", round=k)
        again = Ledger(tmp_path / "ledger", DATA)  # as after a restart
        assert again.would_spend(release) == epsilon(*entered, release)
        assert again.would_spend(release, STRONG) > again.would_spend(release)
        assert again.account().epsilon() == epsilon(*entered), "asking enters nothing"
        again.spend(release)
        entered.append(release)
        account = ledger.account()
        assert account.epsilon() == epsilon(*entered)
        assert (account.results, account.torn) == (len(entered), 0)
    assert account.runs == {f"run-{k}" for k in range(4)}
    assert ledger.account().epsilon(1e-7) > ledger.account().epsilon(1e-5)


def test_files_are_the_users_own(ledger: Ledger) -> None:
    ledger.spend(ONE)
    assert stat.S_IMODE(ledger.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    before = ledger.path.read_bytes()
    ledger.spend(STRONG)
    assert ledger.path.read_bytes().startswith(before), "append-only"
    (first, _) = map(json.loads, ledger.path.read_text().splitlines())
    about = {"mechanism": "dp-sgd", "noise_multiplier": 1.1, "rate": 0.25, "steps": 3}
    assert first.items() >= {**about, "run": "first", "round": 1, "kind": "train"}.items()


def test_a_result_without_noise_has_no_epsilon(ledger: Ledger) -> None:
    for release in (ONE, PLAIN, ONE):
        ledger.spend(release)
    account = ledger.account()
    assert account.epsilon() == math.inf == ledger.would_spend(ONE)
    assert account.protected_epsilon() == epsilon(ONE, ONE)
    assert "ε = ∞ over 3 results, 1 of them without" in account.text()
    assert f"{epsilon(ONE, ONE):.4g}" in account.text()


def test_data_that_share_a_row_share_an_account(tmp_path: Path) -> None:
    grown: Keys = np.append(DATA, np.uint64(99))
    other: Keys = np.arange(100, 120, dtype=np.uint64)
    Ledger(tmp_path, DATA).spend(ONE)
    Ledger(tmp_path, other).spend(STRONG)
    assert Ledger(tmp_path, grown).account().epsilon() == epsilon(ONE)
    Ledger(tmp_path, grown).spend(STRONG)
    assert Ledger(tmp_path, DATA).account().epsilon() == epsilon(ONE, STRONG)
    assert Ledger(tmp_path, other).account().epsilon() == epsilon(STRONG)
    last: Keys = DATA[-1:]
    assert Ledger(tmp_path, last).account().epsilon() == epsilon(ONE, STRONG)
    assert len(ledgers(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_ledger_whose_rows_are_lost_counts_for_all_data(damage: str, tmp_path: Path) -> None:
    Ledger(tmp_path, DATA).spend(ONE)
    (rows,) = tmp_path.glob("*.rows")
    content = rows.read_bytes()
    if damage == "gone":
        rows.unlink()
    else:
        rows.write_bytes(content[:-3] if damage == "cut" else content[:-1] + b"\xff")
    other = Ledger(tmp_path, np.arange(500, 510, dtype=np.uint64))
    assert other.account().epsilon() == epsilon(ONE)


# ── torn lines ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("torn", [ONE, STRONG, PLAIN])
def test_a_line_torn_at_any_byte_counts(torn: Release, ledger: Ledger) -> None:
    ledger.spend(STRONG)
    before = ledger.path.read_bytes()
    ledger.spend(torn)
    line = ledger.path.read_bytes().removeprefix(before)
    for cut in range(1, len(line)):
        ledger.path.write_bytes(before + line[:cut])
        account = ledger.account()
        if torn is PLAIN and cut > len('{"mechanism": "'):
            assert account.epsilon() == math.inf, cut
        elif torn is not PLAIN:
            assert account.epsilon() >= epsilon(STRONG, torn), cut
        assert account.epsilon() > epsilon(STRONG), cut
        assert account.torn == (cut < len(line) - 1), cut  # a line without its break is whole
        ledger.spend(ONE)
        after = ledger.account()
        assert (after.results, after.torn) == (3, account.torn), cut
        assert after.epsilon() >= Ledger(ledger.path.parent, DATA).account().epsilon()
        if torn is not PLAIN:
            assert after.epsilon() >= epsilon(STRONG, torn, ONE), cut


@pytest.mark.parametrize("tail", [b"\0" * 200, b"\xff\xfe", b"[1, 2]", b'"x"', b"{}", b"[" * 9999])
def test_what_a_crash_leaves_in_place_of_a_line_counts_as_the_costliest(
    tail: bytes, ledger: Ledger
) -> None:
    ledger.spend(ONE)
    ledger.spend(STRONG)
    for ending in (b"", b"\n"):
        content = ledger.path.read_bytes()
        ledger.path.write_bytes(content + tail + ending)
        least, most, steps = (0.7, 0.5, 9)
        assert ledger.account().epsilon() == epsilon(
            ONE, STRONG, Release("dp-sgd", least, most, steps)
        )
        ledger.path.write_bytes(content)


def test_a_ledger_of_nothing_but_a_torn_line_says_that_it_does_not_know(ledger: Ledger) -> None:
    ledger.spend(ONE)
    ledger.path.write_bytes(b'{"mech')
    assert ledger.account().epsilon() == math.inf


def test_lines_that_lie_about_their_cost_are_not_believed(ledger: Ledger) -> None:
    ledger.spend(ONE)
    line = json.loads(ledger.path.read_text())
    for change in (
        {"noise_multiplier": -1}, {"noise_multiplier": "1"}, {"rate": 1.5}, {"rate": None},
        {"steps": -3}, {"noise_multiplier": float("nan")}, {"mechanism": "magic"}, {"extra": 1},
    ):  # fmt: skip
        ledger.path.write_text(json.dumps(line) + "\n" + json.dumps({**line, **change}) + "\n")
        account = ledger.account()
        assert account.torn == 1 and account.epsilon() >= epsilon(ONE, ONE), change


def enter(folder: Path, times: int) -> None:
    for _ in range(times):
        Ledger(folder, DATA).spend(ONE)


@pytest.mark.parametrize("attempt", range(5))
def test_processes_that_enter_at_once_lose_nothing(
    ledger: Ledger, forks: Forks, attempt: int
) -> None:
    """From the first line on: who makes the folder and enters the rows is not agreed either."""
    children = [forks.start(enter, ledger.path.parent, 30) for _ in range(4)]
    assert all(forks.wait(child) == 0 for child in children)
    assert (ledger.account().results, ledger.account().torn) == (120, 0)


def enter_within(folder: Path, most: float) -> None:
    """Enter as often as a limit allows; each check takes a while, as a large account does."""
    own = Ledger(folder, DATA)

    def check() -> None:
        within = own.would_spend(ONE) <= most
        time.sleep(0.002)
        if not within:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        for _ in range(20):
            own.spend(ONE, check)


def test_processes_together_stay_within_a_limit(ledger: Ledger, forks: Forks) -> None:
    children = [forks.start(enter_within, ledger.path.parent, epsilon(*[ONE] * 9)) for _ in "1234"]
    assert all(forks.wait(child) == 0 for child in children)
    assert ledger.account().results == 9


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    assert usable(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EnvironmentFailure, match=r"cannot be kept in .*file") as told:
            usable(path)
        assert "--ledger" in told.value.fix


# ── kills ─────────────────────────────────────────────────────────────────────────────────────

CALLS = ("mkdir", "open", "write", "fsync", "close", "replace")


def answer(folder: Path, out: Path, strike: int, spend_first: bool) -> None:
    """Three results, each entered and sent, and SIGKILL at one of the operating system's calls."""
    done = 0

    def struck(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == strike:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, struck(getattr(os, name)))
    for k in range(3):
        if spend_first:
            Ledger(folder, DATA).spend(replace(ONE, round=k))
        with out.open("ab", buffering=0) as sent:
            sent.write(b".")
        if not spend_first:
            Ledger(folder, DATA).spend(replace(ONE, round=k))


def undercounts(folder: Path, forks: Forks, *, spend_first: bool) -> tuple[int, int]:
    """How many kills there were, and after how many the ledger has fewer results than were sent."""
    low = 0
    for strike in range(1, 200):
        one = folder / f"{spend_first}-{strike}"
        one.mkdir()
        out = one / "sent"
        end = os.waitstatus_to_exitcode(forks.run(answer, one / "ledger", out, strike, spend_first))
        sent = len(out.read_bytes()) if out.exists() else 0
        account = Ledger(one / "ledger", DATA).account()
        if end != -signal.SIGKILL:
            assert end == 0
            assert sent == account.results == 3
            return strike - 1, low
        low += account.results < sent
        assert account.results <= sent + 1, "too high by the one in hand at most"
        Ledger(one / "ledger", DATA).spend(ONE)  # and it goes on
        assert Ledger(one / "ledger", DATA).account().results == account.results + 1
    raise AssertionError("there is no end to it")


def test_no_kill_lets_a_result_leave_that_is_not_entered(tmp_path: Path, forks: Forks) -> None:
    kills, low = undercounts(tmp_path, forks, spend_first=True)
    assert kills >= 15 and low == 0


def test_the_harness_sees_a_client_that_sends_first(tmp_path: Path, forks: Forks) -> None:
    kills, low = undercounts(tmp_path, forks, spend_first=False)
    assert kills >= 15 and low > 0


def test_the_line_is_synced_before_spend_returns(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a new ledger its name, too; the control is the order of calls itself."""
    events: list[str] = []
    real_fsync, real_write = os.fsync, os.write

    def fsync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_fsync(descriptor)

    def write(descriptor: int, data: Any) -> int:
        events.append(f"write {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "write", write)
    ledger.spend(ONE)
    name = ledger.path.name
    assert events[-3:] == [f"write {name}", f"sync {name}", f"sync {ledger.path.parent.name}"]
    events.clear()
    ledger.spend(ONE)
    assert events == [f"write {name}", f"sync {name}"]


def test_a_short_write_is_finished_and_a_full_disk_is_told(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    ledger.spend(ONE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda d, data: real(d, bytes(data)[:7]))
        ledger.spend(ONE)
    assert ledger.account().epsilon() == epsilon(ONE, ONE) and ledger.account().torn == 0

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentFailure, match="No space left"):
        ledger.spend(ONE)


def test_a_life_of_random_kills_tears_and_runs_never_counts_too_little(tmp_path: Path) -> None:
    """Against a list of what was sent, kept by hand; damaged as crashes do it, at the end."""
    rng = random.Random(5)
    sent: list[Release] = []
    for step in range(120):
        ledger = Ledger(tmp_path, DATA)
        release = Release(
            "dp-sgd", rng.choice([0.8, 1.0, 2.0]), rng.choice([0.1, 0.3]), rng.randint(1, 9),
            run=rng.choice("abc"), round=step,
        )  # fmt: skip
        if rng.random() < 0.3 and sent:  # killed in the line: nothing was sent
            ledger.spend(release)
            content = ledger.path.read_bytes()
            last = len(content.splitlines(keepends=True)[-1])
            ledger.path.write_bytes(content[: len(content) - rng.randint(1, last)])
        else:
            ledger.spend(release)
            if rng.random() < 0.8:  # else killed between the line and the network
                sent.append(release)
        assert ledger.account().epsilon() >= epsilon(*sent)
    assert ledger.account().torn > 0


# ── at work ───────────────────────────────────────────────────────────────────────────────────


class Desk:
    """A client with its data, asked by a server that may say anything."""

    def __init__(self, model: Path, data: Path, folder: Path, run: str = "run") -> None:
        self.told: list[str] = []
        self.task = TaskSpec(
            model=ModelSpec(source=str(model)),
            lora=LoraSpec(rank=4, alpha=8),
            data=DataSpec(source="own"),
            classes=("animal", "plant", "tool"),
        )
        site = Site(data, model=str(model), ledger=folder / "ledger")
        self.resident = Resident("ann", site, KeptParts(folder / "kept"), self.told.append)
        found = models.fingerprint(models.resolve(self.task.model))
        wanted = {**found, "data_schema": data_schema(self.task, self.task.classes)}
        self.run = run
        self.examples = self.resident.load(run, self.task.model_dump_json(), wanted).examples

    @property
    def ledger(self) -> Ledger:
        assert self.resident._ledger is not None
        return self.resident._ledger

    @property
    def start(self) -> Adapter:
        assert self.resident._bench is not None
        return self.resident._bench.initial(4)

    def train(self, training: LocalTraining, round_: int = 1) -> Any:
        plan = TrainPlan(start=self.start, training=training, round=round_, site="ann")
        return self.work("train", codec.Encoder("{}").train(plan), self.run, round_)

    def evaluate(self, plan: EvalPlan) -> Any:
        plan = replace(plan, round=1, site="ann")
        return self.work("evaluate", codec.Encoder("{}").evaluate(plan), self.run, 1)

    def work(self, kind: str, content: Any, run: str, round_: int) -> Any:
        plan = content.config_records["config"]["plan"]
        ticket = Ticket(run, round_, "ann", kind, "base")
        return self.resident.work(ticket, plan, content)


@pytest.fixture
def desk(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Desk:
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(tiny_data.read_text().splitlines()[:30]) + "\n")
    return Desk(tiny_model, own, tmp_path)


DP = LocalTraining(batch_size=6, steps=2, dp_noise=1.25, dp_clip=0.5)


def test_it_enters_what_it_did_and_says_so(desk: Desk, tiny_model: Path, tmp_path: Path) -> None:
    assert desk.told == [f"privacy ledger of these data: {desk.ledger.path}"]
    assert not isinstance(desk.train(DP), Failure)
    one = Release("dp-sgd", 1.25, 6 / 30, 2)
    assert desk.ledger.account().epsilon() == epsilon(one)
    assert desk.told[-1] == f"privacy spent: ε = {epsilon(one):.4g} at δ = 1e-05 over 1 result"
    another = Desk(tiny_model, tmp_path / "own.jsonl", tmp_path, "another-run")
    another.train(replace(DP, steps=None, epochs=3, dp_noise=2.0), 7)
    two = Release("dp-sgd", 2.0, 6 / 30, 15)
    assert desk.ledger.account().epsilon() == epsilon(one, two)
    other = tmp_path / "moved"
    other.mkdir()
    moved = other / "renamed.jsonl"
    moved.write_text("\n".join(reversed((tmp_path / "own.jsonl").read_text().splitlines())) + "\n")
    again = Desk(tiny_model, moved, tmp_path)
    assert again.ledger.path == desk.ledger.path
    assert "privacy spent before: ε = " in again.told[-1]
    assert again.ledger.account().epsilon() == epsilon(one, two)


def test_what_another_client_entered_meanwhile_counts_against_the_limit(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clients on the same rows: each is allowed at the start of its work, one at its end."""
    one = Release("dp-sgd", 1.25, 6 / 30, 2)
    desk.resident.site = replace(desk.resident.site, policy=Policy(most_epsilon=epsilon(one)))
    work = Resident._spend

    def late(self: Resident, release: Release | None) -> None:
        desk.ledger.spend(one)
        work(self, release)

    with monkeypatch.context() as patch:
        patch.setattr(Resident, "_spend", late)
        outcome = desk.train(DP)
    assert isinstance(outcome, Failure) and outcome.reason == "privacy"
    assert desk.ledger.account().results == 1


def test_a_plan_without_noise_and_one_with_less_are_entered_as_such(desk: Desk) -> None:
    """A server that strips the noise, or lowers it, changes the account, not what it says."""
    desk.train(replace(DP, dp_noise=0.0))
    desk.train(DP, round_=2)
    desk.train(replace(DP, dp_noise=0.5), round_=3)
    expected = epsilon(Release("dp-sgd", 1.25, 0.2, 2), Release("dp-sgd", 0.5, 0.2, 2))
    account = desk.ledger.account()
    assert account.epsilon() == math.inf and account.protected_epsilon() == expected
    assert "without differential privacy" in desk.told[-1]


def test_every_client_says_once_that_its_rows_have_no_protection(
    desk: Desk, tiny_model: Path, tmp_path: Path
) -> None:
    """Also where another client of this user, on the same rows, was the first to enter a result."""
    other = Desk(tiny_model, tmp_path / "own.jsonl", tmp_path, "another-run")
    bare = replace(DP, dp_noise=0.0)
    for round_ in (1, 2, 3):
        for one in (other, desk):
            assert not isinstance(one.train(bare, round_), Failure)
    for one, results in ((other, "1 result"), (desk, "2 results")):
        said = [line for line in one.told if "∞" in line]
        assert len(said) == 1 and f"privacy spent: ε = ∞ over {results}, " in said[0]
    later = Desk(tiny_model, tmp_path / "own.jsonl", tmp_path, "a-later-run")
    later.train(bare)
    assert [line.partition(":")[0] for line in later.told if "∞" in line] == [
        "privacy spent before"
    ]


def test_a_run_that_trained_with_noise_never_trains_with_less(desk: Desk) -> None:
    """Row 72: without a policy of the client's, too."""
    desk.train(DP)
    for noise in (0.0, 0.5, 1.2499):
        refused = desk.train(replace(DP, dp_noise=noise), round_=2)
        assert isinstance(refused, Failure) and refused.reason == "privacy"
        assert "its privacy was taken out" in refused.details
    compared = desk.evaluate(EvalPlan(desk.start, probe="block-influence"))
    assert isinstance(compared, Failure) and compared.reason == "privacy"
    assert desk.ledger.account().results == 1, "nothing was done"
    assert not isinstance(desk.train(replace(DP, dp_noise=2.0), round_=2), Failure)


def test_scores_and_comparisons_of_ones_own_examples_are_entered(desk: Desk) -> None:
    desk.evaluate(EvalPlan(adapter=desk.start, split="test"))
    desk.evaluate(EvalPlan(adapter=desk.start, split="holdout", site="ann"))
    assert desk.ledger.account() == Account(), "there were no examples to look at"
    assert not isinstance(
        desk.evaluate(EvalPlan(desk.start, probe="block-influence", site="ann")), Failure
    )
    assert desk.ledger.account().unprotected == 1


def test_work_that_fails_is_not_entered(desk: Desk) -> None:
    plan = TrainPlan(start=desk.start, training=DP, round=1, site="bob")
    failed = desk.work("train", codec.Encoder("{}").train(plan), "run", 1)
    assert isinstance(failed, Failure)
    assert isinstance(desk.train(DP), Failure) is False
    assert desk.ledger.account().results == 1


def test_what_cannot_be_entered_does_not_leave(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedft.clients.ledger.os.write", full)
        outcome = desk.train(DP)
    assert isinstance(outcome, Failure)
    assert str(desk.ledger.path.parent) not in outcome.reason, "paths are the client's own business"
    assert outcome.reason == "ledger" and "No space left" in outcome.details
    assert not isinstance(desk.train(DP), Failure)


def work_and_die(model: Path, data: Path, folder: Path, out: Path, after: bool) -> None:
    """A client like ``desk``, that dies before or after it has entered its result."""
    real = Ledger.spend

    def struck(self: Ledger, release: Release, check: Any = lambda: None) -> None:
        if after:
            real(self, release, check)
        os.kill(os.getpid(), signal.SIGKILL)

    Ledger.spend = struck
    Desk(model, data, folder).train(DP)
    out.write_text("sent")


def test_no_kill_at_work_lets_a_result_leave_that_is_not_entered(
    desk: Desk, forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    """SIGKILL in a client with a model, between its training, its ledger and its answer."""
    own, out = tmp_path / "own.jsonl", tmp_path / "sent"
    for after, entered in ((False, 0), (True, 1)):
        end = forks.run(work_and_die, tiny_model, own, tmp_path, out, after)
        assert os.waitstatus_to_exitcode(end) == -signal.SIGKILL
        assert not out.exists()
        assert desk.ledger.account().results == entered
    desk.train(DP)  # the round is done again, with noise of its own
    assert desk.ledger.account().epsilon() == epsilon(Release("dp-sgd", 1.25, 0.2, 4))


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 100])
@pytest.mark.parametrize("steps", [None, 4])
def test_it_accounts_as_the_server_does(rows: int, steps: int | None) -> None:
    from fedft.server.config_file import parse_config
    from fedft.server.privacy import example_epsilons, local_steps

    training: dict[str, Any] = {"batch-size": 6, "epochs": 2, "dp": {"noise-multiplier": 1.25}}
    config = parse_config({"training": training | ({"steps": steps} if steps else {})})
    plan = {"training": vars(config.training.local())}
    release = release_of("train", plan, rows)
    assert (release.rate, release.steps) == local_steps(config, rows)
    line = {"round": 1, "example": {"ann": [1.25, *local_steps(config, rows)]}}
    assert Account().plus([release] * 3).epsilon() == example_epsilons([line] * 3, 1e-5)["ann"]


# ── the command ───────────────────────────────────────────────────────────────────────────────


def test_the_command_prints_every_account(tmp_path: Path) -> None:
    def run(*options: str) -> str:
        done = CliRunner().invoke(cli, ["ledger", "--ledger", str(tmp_path / "l"), *options])
        assert done.exit_code == 0, done.output
        return done.output

    assert "nothing is entered" in run()
    one, two = Ledger(tmp_path / "l", DATA), Ledger(tmp_path / "l", DATA + np.uint64(1000))
    one.spend(ONE)
    two.spend(replace(PLAIN, run="\x1b[31mred"))
    text = run()
    assert f"data {one.name}: ε = {epsilon(ONE):.4g} at δ = 1e-05 over 1 result" in text
    assert "ε = ∞ over 1 result, 1 of them without" in text
    assert str(one.path) in text.replace("\n", "") and "\x1b" not in text
    told = {line["data"]: line for line in json.loads(run("--json", "--delta", "1e-6"))}
    assert told[two.name]["epsilon"] is None and told[two.name]["unprotected"] == 1
    assert told[one.name]["epsilon"] == one.account().epsilon(1e-6)
    assert told[one.name]["runs"] == ["first"]
