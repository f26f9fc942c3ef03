"""Writing files that survive a crash, through a seam that tests can break.

Three rules hold everywhere: content is synced before its name appears (write a temporary file,
fsync, rename), a name is synced before anything relies on it (fsync of the folder), and nothing is
removed before its successor is durable. Every step goes through :class:`Files`, so that a test can
stop the machine between any two of them.
"""

import contextlib
import os
from collections.abc import Generator
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


def read_text(path: Path) -> str:
    """The text of a small file that a user named, without a byte order mark.

    Raises:
        ConfigError: it is not there, not a file, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ConfigError(f"cannot read {path}: it is a pipe or a device", fix="Name a file.")
        return path.read_text(encoding="utf-8-sig")
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
