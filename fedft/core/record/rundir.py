"""The run directory: the record that proves how an adapter came about.

    config.toml            resolved, runnable
    environment.json       versions, git state, argv, schema version, hashes of model and data
    rounds.jsonl           one line a round
    clients.jsonl          one line a reply
    privacy.jsonl          one line an attempt at a round, where the run promises privacy
    adapters/round-0020/   PEFT adapters
    start/                 the adapter that the run goes on from, with ``[lora] start``
    tokenizer/             the tokenizer as the run used it: what pads is decided, see special_tokens
    checkpoints/           ServerState, see fedft.server.checkpoints
    partition/             who holds which rows
    trackers/              of what else was told of the run, see fedft.trackers; derived
    report/                derived; delete at will
    summary.json           written last; absent means unfinished

One process writes a run, any number read it. Durability is tied to the checkpoint: a round's
lines go to disk before the round is committed, so a crash can leave lines of a round that never
was committed (:meth:`RunDir.truncate_to` drops them on resume) but never a committed round without
its lines.
"""

import contextlib
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, cast

from fedft.core.errors import ConfigError, EnvironmentFailure, IntegrityError, SecurityRefusal
from fedft.core.files import Files, disk, read_plain, temporary, write_file
from fedft.core.record import environment, jsonl, lock
from fedft.core.record.jsonl import LARGEST, Record
from fedft.core.record.lines import ClientLine, Release, RoundLine, Summary

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
        self._lock = lock.Lock(self.path) if writing else None
        self._made = False

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
            allowed = _UNBEGUN if same else {lock.NAME, temporary(known).name}
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
        schema = run.environment().get("schema", environment.SCHEMA)
        if not isinstance(schema, int) or schema > environment.SCHEMA:
            raise EnvironmentFailure(
                f"{path} has format {schema}; this fedft reads formats up to {environment.SCHEMA}",
                fix="Install the version of fedft named in environment.json, or a newer one.",
            )
        if not writing:
            return run
        writer = cls(path, writing=True)
        for file in (writer._rounds, writer._clients, writer._releases):
            jsonl.cut_torn_line(file)
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
    def start(self) -> Path:
        """Folder of the adapter that the run goes on from; absent where the seed makes the first one."""
        return self.path / "start"

    @property
    def trackers(self) -> Path:
        """Folder of the files of trackers, each in one of its own."""
        return self.path / "trackers"

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
            text = read_plain(self._config, largest=LARGEST, within=self.path)
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
        return jsonl.read_object(self.path / "environment.json")

    def write_environment(
        self, hashes: Mapping[str, str], facts: Mapping[str, object] | None = None
    ) -> None:
        """Stores versions, platform, git state and command line, with what the caller knows.

        Args:
            hashes: of the inputs, e.g. ``base_model``, ``tokenizer``, ``data``.
            facts: further keys, e.g. ``device``.
        """
        self._writer()
        record = environment.surroundings() | {"hashes": dict(hashes)} | dict(facts or {})
        write_file(self.path / "environment.json", jsonl.pretty(record))

    def amend_environment(self, facts: Mapping[str, object]) -> None:
        """Adds to what is stored already what was found out later."""
        self._writer()
        write_file(self.path / "environment.json", jsonl.pretty(self.environment() | dict(facts)))

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
        return environment.changed_versions(self.environment().get("versions", {}))

    # The record that grows.

    def append_client(self, line: ClientLine) -> None:
        """Adds one reply to ``clients.jsonl``. On disk with the next :meth:`append_round`.

        Args:
            line: numbers that are not finite become null.
        """
        self._append(self._clients, line)

    def append_round(self, line: RoundLine) -> None:
        """Adds one round to ``rounds.jsonl`` and makes it and its clients' lines durable.

        To be called *before* the round's checkpoint is committed.

        Args:
            line: numbers that are not finite become null.
        """
        self._append(self._rounds, line)
        for file in (self._clients, self._rounds):
            with disk(f"write {file}"):
                file.touch()
                jsonl.sync(file)
        with disk(f"write {self.path}"):
            Files().sync_folder(self.path)

    def rounds(self, until: int | None = None) -> list[RoundLine]:
        """The lines of ``rounds.jsonl``; what a crash left at the end is left out.

        Args:
            until: the last round that is wanted; None reads all.

        Raises:
            IntegrityError: a line is damaged that an intact one follows.
        """
        return [cast(RoundLine, line) for _, line in jsonl.lines(self._rounds, until)]

    def clients(self) -> Iterator[ClientLine]:
        """The lines of ``clients.jsonl``, one after another; as :meth:`rounds`."""
        return (cast(ClientLine, line) for _, line in jsonl.lines(self._clients))

    def truncate_to(self, round: int) -> None:
        """Drops the lines of all rounds after ``round``, the last one committed.

        Raises:
            IntegrityError: a line of a committed round is damaged.
        """
        self._writer()
        for file in (self._rounds, self._clients):
            kept = b"".join(line for line, _ in jsonl.lines(file, until=round))
            with disk(f"read {file}"):
                changed = file.exists() and file.stat().st_size != len(kept)
            if changed:
                write_file(file, kept)

    def append_release(self, line: Release) -> None:
        """Adds a line to the privacy ledger and makes it durable.

        To be called *before* anything it accounts for leaves the server or a site. No resume ever
        drops a line again.
        """
        self._append(self._releases, line)
        with disk(f"write {self._releases}"):
            jsonl.sync(self._releases)
            Files().sync_folder(self.path)

    def releases(self) -> list[Release]:
        """The lines of the privacy ledger.

        Raises:
            IntegrityError: a line is damaged that an intact one follows.
        """
        return [cast(Release, line) for _, line in jsonl.lines(self._releases)]

    # The end.

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self._summary.is_file()

    def summary(self) -> Summary | None:
        """What the run came to; None while it is unfinished."""
        found = jsonl.read_object(self._summary)
        return cast(Summary, found) if found else None

    def write_summary(self, summary: Summary) -> None:
        """Stores the summary, the last act of a run; numbers that are not finite become null."""
        self._writer()
        write_file(self._summary, jsonl.pretty(summary))

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
            (self.path / lock.NAME).unlink(missing_ok=True)
            if self._made:
                self.path.rmdir()

    def _clear(self) -> None:
        """Remove what a run is started from; its configuration, which marks it as a run, last."""
        with disk(f"clear {self.path}"):
            for folder in (self.partition, self.start, self.tokenizer, self.trackers):
                if folder.exists():
                    shutil.rmtree(folder)
            for file in (self.path / "environment.json", self._config):
                temporary(file).unlink(missing_ok=True)
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the lock back. Reading goes on working."""
        if self._lock is not None:
            self._lock.release()

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
        if not self._lock:
            raise RuntimeError(f"{self.path} is open for reading; use RunDir.open(…, writing=True)")

    def _append(self, file: Path, record: Mapping[str, object]) -> None:
        self._writer()
        jsonl.append(file, record)


_UNBEGUN = frozenset(
    {
        *(lock.NAME, "config.toml", "environment.json", "partition", "tokenizer", "start"),
        *("trackers", ".config.toml.tmp", ".environment.json.tmp"),
    }
)
"""What is in the folder of a run before its first round, or its first client."""

_FILES = (
    *(
        lock.NAME,
        "config.toml",
        "environment.json",
        "summary.json",
        "rounds.jsonl",
        "clients.jsonl",
    ),
    *("privacy.jsonl", "audit.jsonl"),
)
_FOLDERS = (
    "adapters",
    "checkpoints",
    "identity",
    "partition",
    "report",
    "start",
    "tokenizer",
    "trackers",
)


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
