"""The run directory: the record that proves how an adapter came about.

    config.toml            resolved, runnable
    environment.json       versions, git state, argv, schema version, hashes of model and data
    rounds.jsonl           one line a round
    clients.jsonl          one line a reply
    privacy.jsonl          one line an attempt at a round, where the run promises privacy
    adapters/round-0020/   PEFT adapters
    tokenizer/             the tokenizer as the run used it: what pads is decided, see special_tokens
    checkpoints/           ServerState, see fedft.server.checkpoints
    partition/             who holds which rows
    report/                derived; delete at will
    summary.json           written last; absent means unfinished

One process writes a run, any number read it. Durability is tied to the checkpoint: a round's
lines go to disk before the round is committed, so a crash can leave lines of a round that never
was committed (:meth:`RunDir.truncate_to` drops them on resume) but never a committed round without
its lines.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, cast

from fedft.core import system
from fedft.core.errors import ConfigError, EnvironmentFailure, IntegrityError, SecurityRefusal
from fedft.core.files import MIB, Files, disk, open_plain, read_plain, temporary, write_file

SCHEMA = 1
"""Version of the run directory's layout. A newer one is refused."""

Record = dict[str, Any]
"""One line of a JSONL file: plain JSON values."""

_PACKAGES = (
    *("fedft", "torch", "transformers", "peft", "safetensors", "flwr", "ray"),
    *("datasets", "flwr-datasets", "numpy"),
)
_BIT_EXACT = ("torch", "transformers", "peft", "numpy")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def child(folder: Path, name: str) -> Path:
    """``folder / name`` for a name that came from outside: of a site, a run, a kit.

    Raises:
        SecurityRefusal: the name could lead elsewhere (``../x``, ``/abs``, a symbolic link), or is
            not made of letters, digits, dot, dash and underscore.
    """
    if not _NAME.fullmatch(name):
        raise SecurityRefusal(
            f"{name[:80]!r} cannot be a file name: it must start with a letter or digit and consist "
            "of at most 128 letters, digits, dots, dashes and underscores",
            fix="Choose a plain name.",
        )
    path = folder / name
    if path.is_symlink():
        raise SecurityRefusal(
            f"{path} is a symbolic link, and could point outside of {folder}",
            fix="Replace the link by the file or folder itself.",
        )
    return path


class RunDir:
    """One run on disk. Made by :meth:`create` or :meth:`open`; a context manager.

    Attributes:
        path: the folder, absolute.
    """

    def __init__(self, path: Path, *, writing: bool) -> None:
        self.path = path.absolute()
        self._lock: int | None = None
        self._made = False
        if writing:
            self._lock = _locked(self.path)
            _writers.add(self)

    @classmethod
    def create(cls, path: Path | None = None, hint: str = "run", again: str | None = None) -> Self:
        """A new run, locked for writing.

        Args:
            path: the folder; it must not exist, or be empty. None makes
                ``runs/<UTC time>-<hint>`` under the working directory.
            hint: a word that tells runs apart, for example the strategy's name.
            again: text of the configuration. A folder where a run with exactly this configuration
                was started and never came to its first round is taken over: the same command works
                again after what kept it from starting was mended.

        Raises:
            ConfigError: the folder holds something already; nothing is ever overwritten.
            SecurityRefusal: ``hint`` is not a plain name.
            EnvironmentFailure: the disk refused, or another process is writing there.
        """
        folder = _fresh(hint) if path is None else path
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, not a folder", fix="Choose another folder.")
        with disk(f"create the run directory {folder}"):
            made = path is None or not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            known = folder / "config.toml"
            same = again is not None and known.is_file() and _is(known, again.encode())
            allowed = _UNBEGUN if same else {_LOCK, temporary(known).name}
            if not {entry.name for entry in folder.iterdir()} <= allowed:
                raise ConfigError(
                    f"{folder} is not empty, and a run never overwrites anything",
                    fix=f"Choose another folder, or continue that run: fedft resume {folder}",
                )
            Files().sync_folder(folder.parent)
        run = cls(folder, writing=True)
        run._made = made
        run._clear()
        return run

    @classmethod
    def open(cls, path: Path, *, writing: bool = False) -> Self:
        """An existing run.

        Args:
            path: its folder.
            writing: take the lock, to go on with the run. Half a line at the end of a JSONL file,
                left by a crash, is cut off.

        Raises:
            ConfigError: the folder is not a run directory.
            EnvironmentFailure: it was written by a newer fedft, or another process is writing it.
        """
        run = cls(path, writing=False)
        _check_own(run.path)
        if not run._config.is_file():
            begun = temporary(run._config).exists()
            why = ", but the beginning of one, which a crash left" if begun else ""
            raise ConfigError(
                f"{path} is not a run directory: it has no config.toml{why}",
                fix="Start the run anew, with the command that started it."
                if begun
                else "Name the folder that `fedft simulate` printed; a run that failed before its "
                "first line has nothing to go on from.",
            )
        schema = run.environment().get("schema", SCHEMA)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise EnvironmentFailure(
                f"{path} has format {schema}; this fedft reads formats up to {SCHEMA}",
                fix="Install the version of fedft named in environment.json, or a newer one.",
            )
        if not writing:
            return run
        writer = cls(path, writing=True)
        for file in (writer._rounds, writer._clients, writer._releases):
            _cut_torn_line(file)
        return writer

    # Where things are. Whoever writes into a folder makes it.

    @property
    def adapters(self) -> Path:
        """Folder of the exported adapters."""
        return self.path / "adapters"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def partition(self) -> Path:
        """Folder of the partition manifest."""
        return self.path / "partition"

    @property
    def report(self) -> Path:
        """Folder of what is derived."""
        return self.path / "report"

    def adapter(self, round: int) -> Path:
        """Folder of one round's adapter, e.g. ``adapters/round-0020``."""
        return self.adapters / f"round-{round:04d}"

    def exported(self) -> list[int]:
        """The rounds whose adapter was exported, ascending."""
        names = (re.fullmatch(r"round-(\d{4,})", entry.name) for entry in self.adapters.glob("*"))
        return sorted(int(name[1]) for name in names if name)

    # The two files that never change.

    @property
    def config(self) -> str:
        """Text of the resolved configuration."""
        with disk(f"read {self._config}"):
            text = read_plain(self._config, largest=_LARGEST, within=self.path)
        if not text.strip():  # it would read as a configuration of defaults
            raise IntegrityError(
                f"{self._config} is damaged: it is empty",
                fix="Restore it from a copy of the run directory.",
            )
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise IntegrityError(
                f"{self._config} is damaged: it is not UTF-8 ({error})",
                fix="Restore it from a copy of the run directory.",
            ) from error

    def write_config(self, text: str) -> None:
        """Stores the resolved configuration, TOML."""
        self._writer()
        write_file(self._config, text.encode())

    def environment(self) -> Record:
        """What the run started on; empty where that was not written yet."""
        return _read_object(self.path / "environment.json")

    def write_environment(
        self, hashes: Mapping[str, str], facts: Mapping[str, object] | None = None
    ) -> None:
        """Stores versions, platform, git state and command line, with what the caller knows.

        Args:
            hashes: of the inputs, e.g. ``base_model``, ``tokenizer``, ``data``.
            facts: further keys, e.g. ``device``.
        """
        self._writer()
        record = surroundings() | {"hashes": dict(hashes)} | dict(facts or {})
        write_file(self.path / "environment.json", _pretty(record))

    def amend_environment(self, facts: Mapping[str, object]) -> None:
        """Adds to what is stored already what was found out later."""
        self._writer()
        write_file(self.path / "environment.json", _pretty(self.environment() | dict(facts)))

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer as the run used it; absent where inputs are no text."""
        return self.path / "tokenizer"

    def keep_tokenizer(self, files: Mapping[str, bytes]) -> None:
        """Stores a tokenizer, once.

        Args:
            files: as ``save_pretrained`` writes them, by name.
        """
        self._writer()
        last = "tokenizer_config.json"  # where this is, all are
        if (self.tokenizer / last).exists():
            return
        with disk(f"create {self.tokenizer}"):
            Files().mkdir(self.tokenizer)
            Files().sync_folder(self.path)
        for name in sorted(files, key=lambda name: (name == last, name)):
            write_file(self.tokenizer / name, files[name])

    def changed_versions(self) -> dict[str, tuple[str | None, str | None]]:
        """Libraries that decide about bits, by (version then, version now), where they differ.

        A resumed run is bit-exact only where this is empty.
        """
        then = self.environment().get("versions", {})
        pairs = {name: (then.get(name), _version(name)) for name in _BIT_EXACT}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    # The record that grows.

    def append_client(self, record: Mapping[str, object]) -> None:
        """Adds one reply to ``clients.jsonl``. On disk with the next :meth:`append_round`.

        Args:
            record: at least ``round``; numbers that are not finite become null.
        """
        self._append(self._clients, record)

    def append_round(self, record: Mapping[str, object]) -> None:
        """Adds one round to ``rounds.jsonl`` and makes it and its clients' lines durable.

        To be called *before* the round's checkpoint is committed.

        Args:
            record: at least ``round``; numbers that are not finite become null.
        """
        self._append(self._rounds, record)
        for file in (self._clients, self._rounds):
            with disk(f"write {file}"):
                file.touch()
                _sync(file)
        with disk(f"write {self.path}"):
            Files().sync_folder(self.path)

    def rounds(self) -> list[Record]:
        """All lines of ``rounds.jsonl``; what a crash left at the end is left out.

        Raises:
            IntegrityError: a line is damaged that an intact one follows.
        """
        return [record for _, record in _lines(self._rounds)]

    def clients(self) -> Iterator[Record]:
        """The lines of ``clients.jsonl``, one after another; as :meth:`rounds`."""
        return (record for _, record in _lines(self._clients))

    def truncate_to(self, round: int) -> None:
        """Drops the lines of all rounds after ``round``, the last one committed.

        Raises:
            IntegrityError: a line of a committed round is damaged.
        """
        self._writer()
        for file in (self._rounds, self._clients):
            kept = b"".join(line for line, _ in _lines(file, until=round))
            with disk(f"read {file}"):
                changed = file.exists() and file.stat().st_size != len(kept)
            if changed:
                write_file(file, kept)

    def append_release(self, record: Mapping[str, object]) -> None:
        """Adds a line to the privacy ledger and makes it durable.

        To be called *before* anything it accounts for leaves the server or a site. No resume ever
        drops a line again.
        """
        self._append(self._releases, record)
        with disk(f"write {self._releases}"):
            _sync(self._releases)
            Files().sync_folder(self.path)

    def releases(self) -> list[Record]:
        """The lines of the privacy ledger.

        Raises:
            IntegrityError: a line is damaged that an intact one follows.
        """
        return [record for _, record in _lines(self._releases)]

    # The end.

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self._summary.is_file()

    def summary(self) -> Record:
        """What the run came to; empty while it is unfinished."""
        return _read_object(self._summary)

    def write_summary(self, record: Mapping[str, object]) -> None:
        """Stores the summary, the last act of a run; numbers that are not finite become null."""
        self._writer()
        write_file(self._summary, _pretty(record))

    @property
    def begun(self) -> bool:
        """Whether anything is there beyond what a run is started from: rounds, clients, spent privacy.

        Until then nothing is lost if the run is started anew, also from other data.
        """
        return not {entry.name for entry in self.path.iterdir()} <= _UNBEGUN

    def discard(self) -> None:
        """Take back a run that has not begun: its files, and its folder where this run made it."""
        self._writer()
        if self.begun:
            raise RuntimeError(f"{self.path} has begun")
        self._clear()
        self.close()
        with disk(f"remove {self.path}"):
            (self.path / _LOCK).unlink(missing_ok=True)
            if self._made:
                self.path.rmdir()

    def _clear(self) -> None:
        """Remove what a run is started from; its configuration, which marks it as a run, last."""
        with disk(f"clear {self.path}"):
            for folder in (self.partition, self.tokenizer):
                if folder.exists():
                    shutil.rmtree(folder)
            for file in (self.path / "environment.json", self._config):
                temporary(file).unlink(missing_ok=True)
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the lock back. Reading goes on working."""
        if self._lock is not None:
            _writers.discard(self)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _config(self) -> Path:
        return self.path / "config.toml"

    @property
    def _rounds(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def _clients(self) -> Path:
        return self.path / "clients.jsonl"

    @property
    def _releases(self) -> Path:
        return self.path / "privacy.jsonl"

    @property
    def _summary(self) -> Path:
        return self.path / "summary.json"

    def _writer(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} is open for reading; use RunDir.open(…, writing=True)")

    def _append(self, file: Path, record: Mapping[str, object]) -> None:
        self._writer()
        if type(record.get("round")) is not int:
            raise TypeError(
                f"a record needs its round, a whole number; got {record.get('round')!r}"
            )
        line = _dumps(plain(record)).encode() + b"\n"
        with disk(f"write {file}"), file.open("ab", buffering=0) as out:
            size = out.tell()
            try:
                # A short write means a full disk; the next one then says so.
                written = out.write(line)
                while written < len(line):
                    written += out.write(line[written:])
            except OSError:
                out.truncate(size)
                raise


_LOCK = ".lock"
_UNBEGUN = frozenset(
    {
        *(_LOCK, "config.toml", "environment.json", "partition", "tokenizer"),
        *(".config.toml.tmp", ".environment.json.tmp"),
    }
)
"""What is in the folder of a run before its first round, or its first client."""

_LARGEST = 64 * MIB
"""Bytes of a file that is read at once."""
_LONGEST = 16 * MIB
"""Bytes of a line. What is longer is damage."""

_FILES = (
    *(_LOCK, "config.toml", "environment.json", "summary.json", "rounds.jsonl", "clients.jsonl"),
    *("privacy.jsonl", "audit.jsonl"),
)
_FOLDERS = ("adapters", "checkpoints", "identity", "partition", "report", "tokenizer")


def _check_own(folder: Path) -> None:
    """Refuse a run directory of which a part is not its own: it was copied from somebody.

    Raises:
        SecurityRefusal: a file is a link, a pipe or a device, or a folder is a link.
    """
    for name in (*_FILES, *_FOLDERS):
        path = folder / name
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue
        if stat.S_ISLNK(mode):
            raise SecurityRefusal(
                f"{path} is a symbolic link, and could lead out of {folder}",
                fix="Replace the link by the file or folder itself.",
            )
        if name in _FILES and not stat.S_ISREG(mode):
            raise SecurityRefusal(
                f"{path} is no regular file", fix="Restore it from a copy of the run directory."
            )


def _is(path: Path, content: bytes) -> bool:
    """Whether a file has this content; another size is not read."""
    return path.stat().st_size == len(content) and path.read_bytes() == content


_writers: "weakref.WeakSet[RunDir]" = weakref.WeakSet()


def _release_in_child() -> None:
    # A lock lives as long as any copy of its descriptor: a forked worker that outlives a killed
    # server would keep the run locked.
    for run in list(_writers):
        run.close()


system.in_forked_children(_release_in_child)


def _locked(folder: Path) -> int:
    """Takes the run's lock, which the system drops when its holder dies, however it dies."""
    path = folder / _LOCK
    with disk(f"lock {path}"):
        descriptor = system.open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            system.lock(descriptor, wait=False)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise EnvironmentFailure(
                f"{folder} is being written by another process, pid {holder}",
                fix="Wait for it or stop it; two servers cannot share a run directory.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _fresh(hint: str) -> Path:
    """A new folder under ``runs``."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    first = child(Path("runs"), f"{stamp}-{hint}")
    path, count = first, 1
    while True:
        with disk(f"create {path}"), contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
        count += 1
        path = first.with_name(f"{first.name}-{count}")


def plain(value: object, where: str = "record") -> Any:
    """A value as JSON can say it: NaN and infinities become null, tuples lists.

    Null stands for "there is no such number", which JSON has no other word for.

    Raises:
        TypeError: a value that is no JSON, named by its key; tensors are to be turned into numbers
            by whoever knows what they mean.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        return {_key(key, where): plain(item, f"{where}.{key}") for key, item in items}
    if isinstance(value, list | tuple):
        items = enumerate(cast(Sequence[object], value))
        return [plain(item, f"{where}[{index}]") for index, item in items]
    raise TypeError(f"{where} is a {type(value).__name__}, which is no JSON value")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}, and keys of JSON are strings")
    return key


def _dumps(value: object, indent: int | None = None) -> str:
    # ASCII only (json's default), so that no text a client sent can steer a terminal.
    return json.dumps(value, allow_nan=False, indent=indent)


def _pretty(record: Mapping[str, object]) -> bytes:
    return _dumps(plain(record), indent=2).encode() + b"\n"


def _read_object(path: Path) -> Record:
    """A JSON object from a file of its own; empty where there is no such file."""
    with disk(f"read {path}"):
        if not path.exists():
            return {}
        text = read_plain(path, largest=_LARGEST)
    record = _parsed(text)
    if record is None:
        raise IntegrityError(
            f"{path} is damaged: it is not a JSON object",
            fix="Restore it from a copy of the run directory.",
        )
    return record


def _parsed(text: bytes) -> Record | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast(Record, record) if isinstance(record, dict) else None


def _lines(path: Path, until: int | None = None) -> Iterator[tuple[bytes, Record]]:
    """The lines of a JSONL file with what they say, of the rounds up to ``until``.

    What follows the last synced line may be anything after a crash: half a line, or blocks of
    zeros. Damage is therefore an error only where a wanted line comes after it.
    """
    with disk(f"read {path}"):
        if not path.exists():
            return
        damaged = 0
        with open_plain(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
                record = _parsed(line) if line.endswith(b"\n") else None
                if record is None or type(record.get("round")) is not int:
                    damaged = damaged or number
                elif until is None or record["round"] <= until:
                    if damaged:
                        raise _damaged_line(path, damaged)
                    yield line, record


def _damaged_line(path: Path, number: int) -> IntegrityError:
    return IntegrityError(
        f"{path}, line {number} is damaged: it is not the record of a round",
        fix="Where a crash did this, `fedft resume` repairs it; else restore the file from a copy.",
    )


def _cut_torn_line(path: Path) -> None:
    """Removes what stands after the last line break: a record that a crash cut short."""
    with disk(f"repair {path}"):
        if not path.exists():
            return
        with path.open("rb+") as file:
            whole = 0
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)


def _sync(path: Path) -> None:
    descriptor = system.open_file(path, os.O_RDWR)  # Windows syncs what is open for writing only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def surroundings() -> Record:
    """What the program runs on: versions, platform, processor, source revision, command line.

    Versions come from package metadata; nothing is imported.
    """
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"count": os.cpu_count(), "machine": platform.machine(), "flags": _cpu_flags()},
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    """The processor's features that decide about speed and rounding; empty where unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return [flag for flag in _CPU_FLAGS if line and flag in line[1].split()]


def _git_state() -> Record | None:
    """Commit of the repository that this source file is tracked in, and whether it was edited."""
    source = Path(__file__)
    tracked = _git(source.parent, "ls-files", "--error-unmatch", source.name)
    commit = _git(source.parent, "rev-parse", "HEAD")
    status = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    if not tracked or commit is None or status is None:
        return None
    return {"commit": commit, "dirty": bool(status)}


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
