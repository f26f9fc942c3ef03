"""The client's own privacy ledger: what has left about its data, whatever any server says.

A line for every result, on disk before the result leaves; of every run, under any name, on the
same rows. ε is computed from these lines, so that a client that is killed, joins again or takes part in
another run never counts too little. It may count too much, by results that were lost on the way.

    <folder>/<data>.example.jsonl   append-only, one line a result
    <folder>/<data>.rows            keys of the rows that it is about, see fedft.core.data.rowkeys

Data sets that share a row share its account: a row's ε is at most that of all results of all data sets
with it.

A line that cannot be read was cut short by a crash. Its result did not leave, since none does before its
line is whole on disk; it counts all the same: as far as it can be read, else as the costliest release that
the ledger has, and as unprotected where there is none.

A result without DP-SGD has no ε: it is entered as unprotected, and the account says ∞.
"""

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedft.core import system
from fedft.core.data.batches import poisson_schedule
from fedft.core.data.rowkeys import Keys, fingerprint
from fedft.core.errors import EnvironmentFailure
from fedft.core.files import Files, disk, write_file
from fedft.core.privacy.accounting import example_epsilon
from fedft.core.terms import terms_from
from fedft.core.types import LocalTraining

DELTA = 1e-5
"""δ at which a client accounts unless told otherwise; that of ``[training] dp``, unless changed there."""

ADJACENCY = "add or remove one example"

_LEDGER = ".example.jsonl"
_ROWS = ".rows"
_LOCK = ".lock"
_NAME_DIGITS = 16
_LONGEST_NAME = 128
_UNPROTECTED = b'{"mechanism": "n'
_OPENING = re.compile(
    rb'\{"mechanism": "dp-sgd", "noise_multiplier": ([^,]+), "rate": ([^,]+), "steps": ([^,]+),'
)
"""How a line begins. What a release costs is written first, and each number is whole where a comma follows."""


@dataclass(frozen=True)
class Release:
    """What leaves with one result.

    Attributes:
        mechanism: ``dp-sgd``; ``none`` of a result that no noise protects.
        noise_multiplier: of each step; 0 without.
        rate: with which each step sampled each example.
        steps: how many.
        run, round, kind: what it answers; for the reader.
    """

    mechanism: Literal["dp-sgd", "none"]
    noise_multiplier: float = 0.0
    rate: float = 1.0
    steps: int = 1
    run: str = ""
    round: int = 0
    kind: str = "train"

    def __post_init__(self) -> None:
        if self.mechanism == "none":
            return
        z, q, n = self.noise_multiplier, self.rate, self.steps
        if not (math.isfinite(z) and z > 0 and 0 <= q <= 1 and n >= 0):
            raise ValueError(f"no release has {z = }, {q = }, {n = }")

    def line(self) -> bytes:
        """As it stands in the file; what it costs comes first."""
        about = asdict(self) | {"run": self.run[:_LONGEST_NAME], "kind": self.kind[:_LONGEST_NAME]}
        about["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        return json.dumps(about).encode() + b"\n"


def release_of(
    kind: str, plan: Mapping[str, Any], rows: int, *, run: str = "", round_: int = 0
) -> Release:
    """What an answer to this plan releases about the rows.

    Args:
        kind: ``train`` or ``evaluate``.
        plan: the fields of the message, as JSON data.
        rows: that this client trains on.
        run: that the plan belongs to.
        round_: of it.
    """
    about: dict[str, Any] = {"run": run, "round": round_, "kind": kind}
    if kind != "train":
        return Release("none", **about)
    training = LocalTraining.of_fields(plan["training"])
    bare = any(term.sends | term.keeps for term in terms_from(plan.get("terms", [])))
    if not training.dp_noise or bare:  # the noise of DP-SGD is in what the optimiser makes alone
        return Release("none", **about)
    rate, steps = poisson_schedule(rows, training)
    return Release("dp-sgd", float(training.dp_noise), rate, steps, **about)


@dataclass(frozen=True)
class Account:
    """What a number of releases come to.

    Attributes:
        steps: (noise multiplier, rate) → DP-SGD steps of it.
        results: how many.
        unprotected: of them without noise.
        torn: of them that could not be read whole.
        runs: their names.
        last: when the newest was entered; empty where unknown.
    """

    steps: Mapping[tuple[float, float], int] = field(default_factory=dict)
    results: int = 0
    unprotected: int = 0
    torn: int = 0
    runs: frozenset[str] = frozenset()
    last: str = ""

    def epsilon(self, delta: float = DELTA) -> float:
        """ε of all of them together; infinite where one is unprotected."""
        return math.inf if self.unprotected else self.protected_epsilon(delta)

    def protected_epsilon(self, delta: float = DELTA) -> float:
        """ε of those with noise alone."""
        return example_epsilon([(z, q, n) for (z, q), n in sorted(self.steps.items())], delta)

    def plus(self, releases: Iterable[Release]) -> "Account":
        """With some more."""
        steps, runs, results, unprotected = Counter(self.steps), {*self.runs}, 0, 0
        for release in releases:
            results += 1
            runs.add(release.run)
            if release.mechanism == "none":
                unprotected += 1
            else:
                steps[release.noise_multiplier, release.rate] += release.steps
        return replace(
            self,
            steps=dict(steps),
            results=self.results + results,
            unprotected=self.unprotected + unprotected,
            runs=frozenset(runs - {""}),
        )

    def text(self, delta: float = DELTA) -> str:
        """``ε = 3.21 at δ = 1e-05 over 4 results``, and what that leaves out."""
        over = f"over {self.results} result{'s' * (self.results != 1)}"
        torn = f"; {self.torn} of them torn, counted at the most" if self.torn else ""
        if not self.unprotected:
            return f"ε = {self.epsilon(delta):.4g} at δ = {delta:g} {over}{torn}"
        alone = f"; the others come to ε = {self.protected_epsilon(delta):.4g} at δ = {delta:g}"
        return (
            f"ε = ∞ {over}, {self.unprotected} of them without differential privacy"
            f"{alone if self.steps else ''}{torn}"
        )


class Ledger:
    """The ledger of one data set, and of those that share rows with it.

    Args:
        folder: of all ledgers of this user; made when something is entered.
        keys: of the rows, see :func:`fedft.core.data.rowkeys.row_keys`.
    """

    def __init__(self, folder: Path, keys: Keys) -> None:
        self._folder = folder
        self._keys = keys
        self._shares: dict[str, bool] = {}
        self.name = fingerprint(keys)[:_NAME_DIGITS]
        self.path = (folder / f"{self.name}{_LEDGER}").absolute()

    def account(self) -> Account:
        """What has been spent so far, in all that is on disk now."""
        return _plus_file(self.overlap(), self.path)

    def would_spend(self, *releases: Release, delta: float = DELTA) -> float:
        """ε after these releases, with all that was spent before. Nothing is entered."""
        return self.account().plus(releases).epsilon(delta)

    def of_run(self, run: str) -> Account:
        """What one run has spent on these rows."""
        mine = [release for release in self._releases() if release.run == run[:_LONGEST_NAME]]
        return Account().plus(mine)

    def trainings(self, run: str) -> int:
        """How many trainings of a run have been answered with these rows."""
        name = run[:_LONGEST_NAME]
        return sum(r.run == name and r.kind == "train" for r in self._releases())

    def _releases(self) -> list[Release]:
        shared = [p for p in _ledgers(self._folder) if p != self.path and self._shares_rows(p)]
        return [release for path in (self.path, *shared) for release in _read(path)[0]]

    def spend(self, release: Release, check: Callable[[], None] = lambda: None) -> None:
        """Enter a result. When this returns, the line is on disk, and the result may leave.

        Args:
            release: of the result.
            check: raises where the result may not leave, with what is entered by now. No other process
                of this user enters anything between the check and the line.

        Raises:
            EnvironmentFailure: the disk refused; the result must not leave.
        """
        with disk(f"create {self._folder}"):
            _made(self._folder)
        with self._alone():
            check()
            rows = self._folder / f"{self.name}{_ROWS}"
            if not rows.exists():
                write_file(rows, self._keys.astype("<u8").tobytes())
            with disk(f"write {self.path}"):
                new = not self.path.exists()
                _append(self.path, release.line())
                if new:
                    Files().sync_folder(self._folder)

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        """While no other client enters anything in this folder: data sets share accounts."""
        path = self._folder / _LOCK
        with disk(f"lock {path}"):
            descriptor = system.open_file(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with disk(f"lock {path}"):
                system.lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    def overlap(self) -> Account:
        """What was spent on other data sets that share rows with this one."""
        total = Account()
        for path in _ledgers(self._folder):
            if path.name != self.path.name and self._shares_rows(path):
                total = _plus_file(total, path)
        return total

    def _shares_rows(self, ledger: Path) -> bool:
        name = ledger.name.removesuffix(_LEDGER)
        if name not in self._shares:
            other = _keys(self._folder, name)
            # What a ledger is about that has lost its rows is not known: it counts.
            self._shares[name] = other is None or bool(np.isin(self._keys, other).any())
        return self._shares[name]


def _plus_file(account: Account, path: Path) -> Account:
    releases, torn, last = _read(path)
    more = account.plus(releases)
    return replace(more, torn=account.torn + torn, last=max(account.last, last))


def ledgers(folder: Path) -> list[Ledger]:
    """All ledgers of a folder whose rows are known, by name."""
    found = ((path, _keys(folder, path.name.removesuffix(_LEDGER))) for path in _ledgers(folder))
    return [Ledger(folder, keys) for _, keys in found if keys is not None]


def usable(folder: Path) -> Path:
    """The folder, made and tried out, so that a client does not train for what it cannot enter.

    Raises:
        EnvironmentFailure: nothing can be written there.
    """
    trial = folder / f".{os.getpid()}.trial"
    try:
        _made(folder)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise EnvironmentFailure(
            f"the privacy ledger of this client cannot be kept in {folder}: {error.strerror}",
            fix="Name another folder with --ledger, the same for all runs on these data.",
        ) from error
    return folder


def default_folder() -> Path:
    """Where a user's ledgers lie."""
    root = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state"))
    return root / "fedft" / "ledger"


def _made(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _ledgers(folder: Path) -> list[Path]:
    with disk(f"read {folder}"):
        return sorted(folder.glob(f"*{_LEDGER}"))


def _keys(folder: Path, name: str) -> Keys | None:
    """The rows that a ledger is about; None where they are not there, or not those."""
    path = folder / f"{name}{_ROWS}"
    with disk(f"read {path}"):
        raw = path.read_bytes() if path.is_file() else b""
    keys = np.frombuffer(raw[: len(raw) // 8 * 8], "<u8").astype(np.uint64)
    return keys if raw and fingerprint(keys).startswith(name) else None


def _append(path: Path, line: bytes) -> None:
    """Add a line and sync it; on a line of its own, also after one that was cut short."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o600)
    try:
        if (size := os.fstat(descriptor).st_size) > 0:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[list[Release], int, str]:
    """The releases of a file, how many of them are torn, and when the last one was entered."""
    with disk(f"read {path}"):
        content = path.read_bytes() if path.exists() else b""
    whole: list[Release] = []
    torn: list[Release | None] = []
    last = ""
    for line in content.split(b"\n"):
        if not line:
            continue
        release, at = _parsed(line)
        if release is None:
            torn.append(_begun(line))
        else:
            whole.append(release)
            last = at
    costliest = _costliest([*whole, *(release for release in torn if release is not None)])
    return [*whole, *(release or costliest for release in torn)], len(torn), last


def _parsed(line: bytes) -> tuple[Release | None, str]:
    try:
        about = json.loads(line)
        at = str(about.pop("at"))
        release = Release(**about)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, ""
    return (release if release.mechanism in ("dp-sgd", "none") else None), at


def _begun(line: bytes) -> Release | None:
    """What a line that was cut short still says about its cost."""
    if line.startswith(_UNPROTECTED):
        return Release("none")
    found = _OPENING.match(line)
    if found is None:
        return None
    try:
        return Release("dp-sgd", float(found[1]), float(found[2]), int(found[3]))
    except ValueError:
        return None


def _costliest(releases: Iterable[Release]) -> Release:
    """One that costs at least what any of these does."""
    noisy = [r for r in releases if r.mechanism == "dp-sgd"]
    if not noisy:
        return Release("none")
    least = min(r.noise_multiplier for r in noisy)
    return Release("dp-sgd", least, max(r.rate for r in noisy), max(r.steps for r in noisy))
