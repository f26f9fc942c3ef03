"""Commits that are cut short: by a crash at any operation, a full disk, a lost cache, SIGKILL.

The disk of `Ledger` promises as little as POSIX does: content is there after fsync of the file,
names are there after fsync of the folder, and of everything else any part may be lost, in any
order. After each crash it can produce, the old checkpoint or the new one must load without a
complaint, and the run must go on.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from fedft.core.digest import state_digest
from fedft.core.errors import EnvironmentFailure, IntegrityError
from fedft.core.files import Files
from fedft.core.record.rundir import RunDir
from fedft.core.types import Adapter, Factors, ServerState
from fedft.server.checkpoints import Checkpoints


def make_state(round: int) -> ServerState:
    g = torch.Generator().manual_seed(round)
    factors = {"q": Factors(torch.randn(2, 3, generator=g), torch.randn(4, 2, generator=g), 0.5)}
    return ServerState(Adapter(factors), round, {}, {"m": torch.randn(3, generator=g)})


def make_sites(round: int) -> dict[str, dict[str, torch.Tensor]]:
    """Two of three sites change each round."""
    return {f"site-{(round + i) % 3}": {"B": torch.tensor([round, i])} for i in range(2)}


class Unsynced(Files):
    """For commits that no crash is aimed at: waiting for the disk is most of their time."""

    def fsync(self, descriptor: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def commit(folder: Path, round: int, files: Files | None = None) -> None:
    Checkpoints(folder, files=files or Unsynced()).commit(
        make_state(round), make_sites(round), {"r": round}
    )


def holds(folder: Path) -> int:
    """The round that loads, after checking every bit of it. 0: nothing was ever committed."""
    checkpoints = Checkpoints(folder)
    loaded = checkpoints.load()
    if loaded is None:
        return 0
    round = loaded.state.round
    assert loaded.notes == ()
    assert loaded.extra == {"r": round}
    assert state_digest(loaded.state) == state_digest(make_state(round))
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for r in range(1, round + 1):
        expected |= make_sites(r)
    assert checkpoints.sites.keys() == expected.keys()
    for name, tensors in expected.items():
        assert torch.equal(checkpoints.sites[name]["B"], tensors["B"])
    return round


# 1. The process dies at an operation; what it did so far is on disk.


class Crash(BaseException):
    """The machine stops: nobody's except clause sees it."""


class Failing(Files):
    """Raises at the n-th operation; a crash also at all later ones, an error only there."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.count = at, error, 0

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at or (self.count > self.at and isinstance(self.error, Crash)):
            raise self.error

    def create(self, path: Path) -> int:
        self._step()
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        # In halves, so that a file can be cut in the middle.
        self._step()
        return super().write(descriptor, data[: len(data) // 2 + 1])

    def fsync(self, descriptor: int) -> None:
        self._step()
        super().fsync(descriptor)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._step()

    def replace(self, source: Path, target: Path) -> None:
        self._step()
        super().replace(source, target)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)

    def sync_folder(self, path: Path) -> None:
        self._step()
        super().sync_folder(path)


def operations(folder: Path, round: int) -> int:
    counter = Failing(10**9, Crash())
    for r in range(1, round):
        commit(folder, r)
    commit(folder, round, counter)
    return counter.count


@pytest.mark.parametrize("round", [1, 4])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new_round(tmp_path: Path, round: int):
    steps = operations(tmp_path / "count", round)
    assert steps > 30
    seen: set[int] = set()
    for at in range(1, steps + 1):
        folder = tmp_path / str(at)
        for r in range(1, round):
            commit(folder, r)
        with pytest.raises(Crash):
            commit(folder, round, Failing(at, Crash()))
        found = holds(folder)
        assert found in (round - 1, round)
        seen.add(found)
        commit(folder, round)
        commit(folder, round + 1)
        assert holds(folder) == round + 1
        assert not list(folder.glob("*.tmp"))
        assert len(list(folder.glob("*.json"))) == 2
    assert seen == {round - 1, round}


# 2. The disk refuses an operation; the process lives on.


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_error_is_a_resumable_failure_that_names_the_path(tmp_path: Path, code: int):
    steps = operations(tmp_path / "count", 4)
    failed = 0
    for at in range(1, steps + 1):
        folder = tmp_path / str(at)
        for r in range(1, 4):
            commit(folder, r)
        checkpoints = Checkpoints(folder, files=Failing(at, OSError(code, os.strerror(code))))
        try:
            checkpoints.commit(make_state(4), make_sites(4), {"r": 4})
        except EnvironmentFailure as error:
            failed += 1
            assert error.exit_code == 3
            assert str(folder) in str(error) or str(folder.parent) in str(error)
            assert os.strerror(code) in str(error)
            assert not list(folder.glob("*.tmp"))
            assert not list(folder.glob(".*.tmp"))
            assert holds(folder) in (3, 4)
            # The same object may try again once there is space.
            checkpoints.commit(make_state(4), make_sites(4), {"r": 4})
        assert holds(folder) == 4
        checkpoints.commit(make_state(5), make_sites(5), {"r": 5})
        assert holds(folder) == 5
    # Only the removal of what is superseded may fail without failing the commit.
    assert failed >= steps - 3


def test_a_read_only_or_obstructed_folder_is_named(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(EnvironmentFailure, match="checkpoints"):
        commit(tmp_path / "checkpoints", 1)


# 3. Power fails: what was not synced may be lost, in any combination.

Disk = dict[str, bytes]


class Ledger(Files):
    """Carries a commit out, and notes each operation for :func:`after_power_loss`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object, object]] = []
        self._inode: dict[int, int] = {}

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._inode[descriptor] = len(self.events)
        self.events.append(("create", path.name, len(self.events)))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        size = super().write(descriptor, data[: len(data) // 2 + 1])
        self.events.append(("write", self._inode[descriptor], bytes(data[:size])))
        return size

    def fsync(self, descriptor: int) -> None:
        self.events.append(("fsync", self._inode[descriptor], None))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.events.append(("replace", source.name, target.name))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.events.append(("unlink", path.name, None))

    def sync_folder(self, path: Path) -> None:
        self.events.append(("sync", path.name, None))


class NoFsync(Ledger):
    """Renames content that was never synced."""

    def fsync(self, descriptor: int) -> None:
        pass


class NoFolderSync(Ledger):
    """Trusts that a rename is durable."""

    def sync_folder(self, path: Path) -> None:
        pass


class RemovesFirst(Ledger):
    """Removes old checkpoints before anything else has happened."""

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        for old in path.glob("round-*.json"):
            self.unlink(old)
        self.sync_folder(path)


def lost(content: bytes, synced: int, adversary: int) -> bytes:
    """What is left of a file: nothing unsynced, half of it, zeros instead, or all."""
    rest = len(content) - synced
    return [
        content[:synced],
        content[: synced + rest // 2],
        content[:synced] + bytes(rest),
        content,
    ][adversary]


def after_power_loss(before: Disk, events: list[tuple[str, object, object]]) -> Iterator[Disk]:
    """The disks that a power loss after ``events`` can leave, for a set of adversaries."""
    content: dict[object, bytes] = {**before}
    synced = {name: len(data) for name, data in content.items()}
    names: dict[str, object] = {name: name for name in before}
    pending: list[tuple[str, object, object]] = []
    for event in events:
        kind, a, b = event
        if kind == "create":
            content[b], synced[b] = b"", 0
        if kind == "write":
            content[a] += b  # type: ignore[operator]
        elif kind == "fsync":
            synced[a] = len(content[a])
        elif kind == "sync":
            names, pending = applied(names, pending), []
        else:
            pending.append(event)
    n = len(pending)
    everything = set(range(n))
    kept = [set(), everything, *({i} for i in range(n)), *(everything - {i} for i in range(n))]
    kept += [set(range(i)) for i in range(n)]
    for choice, adversary in product(kept, range(4)):
        there = applied(names, [e for i, e in enumerate(pending) if i in choice])
        yield {
            name: lost(content[inode], synced[inode], adversary) for name, inode in there.items()
        }


def applied(names: dict[str, object], events: list[tuple[str, object, object]]):
    names = dict(names)
    for kind, a, b in events:
        if kind == "create":
            names[str(a)] = b
        elif kind == "replace" and a in names:
            names[str(b)] = names.pop(str(a))
        elif kind == "unlink":
            names.pop(str(a), None)
    return names


def survives_power_loss(tmp_path: Path, round: int, files: Ledger) -> int:
    """Cuts the power after every operation of a commit; returns how many disks were tried."""
    work = tmp_path / "checkpoints"
    for r in range(1, round):
        commit(work, r)
    before = {p.name: p.read_bytes() for p in work.glob("*")} if work.exists() else {}
    commit(work, round, files)
    # The sync of the parent makes the folder itself durable; names in it are another matter.
    events = [e for e in files.events if e[:2] != ("sync", tmp_path.name)]
    tried: set[frozenset[tuple[str, bytes]]] = set()
    for end in range(len(events) + 1):
        for disk in after_power_loss(before, events[:end]):
            key = frozenset(disk.items())
            if key not in tried:
                check_disk(tmp_path / f"disk-{len(tried)}", disk, round)
                tried.add(key)
            if end == len(events):
                write(tmp_path / "final", disk)
                assert holds(tmp_path / "final") == round, "a commit that returned was lost"
    return len(tried)


def check_disk(folder: Path, disk: Disk, round: int) -> None:
    write(folder, disk)
    assert holds(folder) in (round - 1, round)
    commit(folder, round)
    assert holds(folder) == round


def write(folder: Path, disk: Disk) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in disk.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("round", [1, 4])
def test_a_power_loss_leaves_the_old_or_the_new_round(tmp_path: Path, round: int):
    assert survives_power_loss(tmp_path, round, Ledger()) > 40


@pytest.mark.parametrize("careless", [NoFsync, NoFolderSync, RemovesFirst])
def test_the_harness_catches_careless_writing(tmp_path: Path, careless: Callable[[], Ledger]):
    with pytest.raises((AssertionError, IntegrityError)):
        survives_power_loss(tmp_path, 4, careless())


# 4. SIGKILL at random instants, run directory and all.

_SERVER = """
import os, random, signal, sys, time, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import helpers
from fedft.core.record.rundir import RunDir

folder, rng = Path(sys.argv[2]), random.Random(0)
for kill in range(20):
    before = helpers.manifests(folder)
    child = os.fork()  # safe: this interpreter is fresh and starts no thread
    if not child:
        try:
            helpers.serve(folder)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # never into the parent's code
    while kill % 2 and helpers.manifests(folder) == before:  # on a busy machine, too
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the server ended by itself"
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the server ended by itself"
    with RunDir.open(folder, writing=True) as run:  # the dead holder's lock is free
        print(helpers.resumed(run), flush=True)
"""


def manifests(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoints/*.json")}


def resumed(run: RunDir) -> int:
    """What `fedft resume` does first; checks that record and checkpoint agree."""
    round = holds(run.checkpoints)
    run.truncate_to(round)
    assert [line["round"] for line in run.rounds()] == list(range(1, round + 1))
    clients = [line["round"] for line in run.clients()]
    assert clients == [r for r in range(1, round + 1) for _ in range(2)]
    return round


def serve(folder: Path) -> None:
    """A server that runs until it is killed."""
    with RunDir.open(folder, writing=True) as run:
        round = resumed(run)
        while True:
            round += 1
            for site in make_sites(round):
                run.append_client({"round": round, "site": site, "text": "x" * 500})
            run.append_round({"round": round})
            commit(run.checkpoints, round, Files())


@pytest.mark.crash
def test_sigkill_at_any_instant_costs_at_most_the_round_in_flight(tmp_path: Path):
    with RunDir.create(tmp_path / "run") as run:
        run.write_config("seed = 0\n")
    (tmp_path / "helpers.py").write_bytes(Path(__file__).read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, str(tmp_path), str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rounds = [int(line) for line in done.stdout.split()]
    assert len(rounds) == 20
    assert rounds == sorted(rounds)
    assert rounds[-1] >= 10  # every other server lived to commit a round
