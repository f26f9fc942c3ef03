"""Writing files that survive a crash, through a seam that tests can break.

Files that came from elsewhere are opened by :func:`open_plain`: no pipe that never ends, no link out
of its folder, nothing larger than what can be meant.

Three rules hold everywhere: content is synced before its name appears (write a temporary file,
fsync, rename), a name is synced before anything relies on it (fsync of the folder), and nothing is
removed before its successor is durable. Every step goes through :class:`Files`, so that a test can
stop the machine between any two of them.
"""

import contextlib
import os
import stat
from collections.abc import Generator
from io import BufferedReader
from pathlib import Path

from fedft.core import system
from fedft.core.errors import ConfigError, EnvironmentFailure


class Files:
    """The operations that durable writing consists of. All raise ``OSError``."""

    def create(self, path: Path) -> int:
        """Opens an empty file for writing; returns its descriptor."""
        return system.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Writes some of ``data``; returns how many bytes."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Makes the content of an open file durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Closes an open file."""
        os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Renames within one folder, over whatever is there."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Removes a file; one that is gone already is no error."""
        path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        """Makes a folder and its parents; an existing one is no error."""
        path.mkdir(parents=True, exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable: creations, renames and removals."""
        system.sync_folder(path)


def temporary(path: Path) -> Path:
    """Where the content of ``path`` is put together. Left-overs are recognised by this name."""
    return path.with_name(f".{path.name}.tmp")


def place(files: Files, path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Its *name* is durable after the next ``sync_folder``.

    Raises:
        EnvironmentFailure: the disk refused; the temporary file is removed.
    """
    draft = temporary(path)
    with disk(f"write {path}"):
        try:
            _fill(files, draft, data)
            files.replace(draft, path)
        except OSError:
            # The disk's answer counts, not that of the clean-up.
            with contextlib.suppress(OSError):
                files.unlink(draft)
            raise


def _fill(files: Files, path: Path, data: bytes) -> None:
    descriptor = files.create(path)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[files.write(descriptor, rest) :]
        files.fsync(descriptor)
    finally:
        files.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file durably, name included.

    Raises:
        EnvironmentFailure: the disk refused; an earlier file of this name is as it was.
    """
    files = Files()
    place(files, path, data)
    with disk(f"write {path}"):
        files.sync_folder(path.parent)


MIB = 1 << 20

LARGEST_TEXT = 256 * MIB
"""Of a file that a user writes, or a program for him: a table of a million devices fits."""

_UNTRUSTED = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class NotPlain(OSError):
    """A file that is none, leads elsewhere, or is too large: ``strerror`` says which."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(None, why, str(path))
        self.strerror = why

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def open_plain(
    path: Path, *, largest: int | None = None, within: Path | None = None
) -> BufferedReader:
    """Open a file for reading that somebody else may have put there.

    A pipe would be read for ever, and so would a device; a link could lead to what its author must
    not see, or to what must not be read.

    Args:
        path: of the file.
        largest: bytes that it may have.
        within: the folder that links may not lead out of; None lets them lead anywhere.

    Raises:
        NotPlain: it is no regular file, has more bytes, or is outside of the folder.
        OSError: it is not there, or cannot be read.
    """
    if within is not None and not path.resolve().is_relative_to(within.resolve()):
        raise NotPlain(path, f"a link that leads out of {within}")
    if path.is_dir():  # where a folder can be opened, and where it cannot
        raise NotPlain(path, "Is a directory")
    file = os.fdopen(os.open(path, _UNTRUSTED), "rb")
    about = os.fstat(file.fileno())
    why = None
    if not stat.S_ISREG(about.st_mode):
        why = "it is a pipe or a device"
    elif largest is not None and about.st_size > largest:
        why = f"it has {about.st_size:,} bytes, and {largest:,} is the most that can be meant"
    if why is not None:
        file.close()
        raise NotPlain(path, why)
    return file


def read_plain(path: Path, *, largest: int, within: Path | None = None) -> bytes:
    """All of such a file; see :func:`open_plain`."""
    with open_plain(path, largest=largest, within=within) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise NotPlain(path, f"it grows beyond {largest:,} bytes")
    return data


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The text of a file that a user named, without a byte order mark.

    Raises:
        ConfigError: it is not there, not a file, too large, or not UTF-8.
    """
    try:
        return read_plain(path, largest=largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"cannot read {path}: it is not UTF-8 at byte {error.start + 1}",
            fix="Save it as UTF-8 text.",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read {path}: {why}", fix="Check the path.") from error


@contextlib.contextmanager
def disk(action: str) -> Generator[None]:
    """Turns an ``OSError`` inside into an :class:`EnvironmentFailure` that says what was tried.

    Args:
        action: a verb and a path, e.g. ``"write runs/x/config.toml"``.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot {action}: {error.strerror or error}",
            fix="Free space or repair the folder; what was committed before is intact, "
            "and `fedft resume` goes on from there.",
        ) from error
