"""What operating systems do differently: file flags, locks, private files, forks.

A client runs on Linux, macOS and Windows. Whatever only some of them have is asked for here and
nowhere else on a client's path, by capability and not by the name of the system.
"""

import errno
import logging
import os
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

_NO_LINKS: int = getattr(os, "O_NOFOLLOW", 0)
_EXTRA: int = (
    _NO_LINKS
    | getattr(os, "O_CLOEXEC", getattr(os, "O_NOINHERIT", 0))
    | getattr(os, "O_BINARY", 0)  # Windows would turn line ends into two bytes
)


def open_file(path: Path, flags: int, mode: int = 0o644) -> int:
    """Open a file: as bytes, not inherited by child processes, and never through a symbolic link.

    Where the system cannot refuse links by itself, the path is looked at first: whoever can swap
    it in between has the rights of this user anyway.

    Args:
        path: of the file.
        flags: of ``os.open``, such as ``os.O_RDONLY``.
        mode: of a file that is made.

    Returns:
        Its descriptor.

    Raises:
        OSError: it cannot be opened, or is a symbolic link.
    """
    if not _NO_LINKS and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | _EXTRA, mode)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Where folders cannot be opened, the system does it."""
    folder: int | None = getattr(os, "O_DIRECTORY", None)
    if folder is None:
        return
    descriptor = os.open(path, os.O_RDONLY | folder | _EXTRA & ~_NO_LINKS)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_forked_children(call: Callable[[], None]) -> None:
    """Run something in every child that is forked from now on, where there are forks."""
    register: Any = getattr(os, "register_at_fork", None)
    if register is not None:
        register(after_in_child=call)


# ── locks ─────────────────────────────────────────────────────────────────────────────────────

_FAR = 1 << 30
"""Where Windows locks one byte: it locks out readers too, and nothing is ever written there."""
_LOOK_S = 0.02


def lock(descriptor: int, *, wait: bool) -> None:
    """Lock an open file for this process; the lock goes when the process does, however it ends.

    Args:
        descriptor: of the file, open for writing.
        wait: until another process gives it back.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        OSError: this file system has no locks.
    """
    _taker()(descriptor, wait)


@cache
def _taker() -> Callable[[int, bool], None]:
    try:
        import fcntl
    except ImportError:
        return _windows_taker()
    module: Any = fcntl

    def take(descriptor: int, wait: bool) -> None:
        module.flock(descriptor, module.LOCK_EX | (0 if wait else module.LOCK_NB))

    return take


def _windows_taker() -> Callable[[int, bool], None]:
    import msvcrt

    module: Any = msvcrt

    def take(descriptor: int, wait: bool) -> None:
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            while True:
                try:
                    return module.locking(descriptor, module.LK_NBLCK, 1)
                except PermissionError as held:
                    if not wait:
                        raise BlockingIOError(errno.EAGAIN, "locked by another process") from held
                    time.sleep(_LOOK_S)
        finally:
            os.lseek(descriptor, at, os.SEEK_SET)

    return take


# ── files for their owner only ────────────────────────────────────────────────────────────────


class Protection(Protocol):
    """How this system keeps a file to its owner."""

    def protect(self, path: Path) -> None:
        """Leave a file or folder to its owner alone; called while it is still empty."""
        ...

    def exposed(self, path: Path, descriptor: int) -> tuple[str, str] | None:
        """Who else can get at a file, and what to do about it; None where nobody is known to."""
        ...


class Modes:
    """POSIX: the mode of a file, and who owns it."""

    def protect(self, path: Path) -> None:
        path.chmod(stat.S_IRWXU if path.is_dir() else stat.S_IRUSR | stat.S_IWUSR)

    def exposed(self, path: Path, descriptor: int) -> tuple[str, str] | None:
        about = os.fstat(descriptor)
        if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return (
                f"can be read or changed by other users (mode {about.st_mode & 0o777:04o})",
                f"If nobody read it: chmod 600 {path}. Otherwise revoke it and invite anew.",
            )
        own: Any = getattr(os, "geteuid", None)
        if own is not None and about.st_uid != own():
            return "belongs to another user", "Copy it as yourself."
        return None


def _run(command: Sequence[str]) -> str | None:
    """What a program prints; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("%s did not work: %s", command[0], error)
        return None
    return done.stdout.decode(errors="replace")


class AccessLists:
    """Windows: access lists, by ``icacls``. As good as that program's answer, and no better.

    A file is left to the user who runs this and to nobody else. Before it is read, three groups
    that hold everybody are looked for, by their numbers: their names differ by language. Where
    ``icacls`` cannot be run, files are as private as the folder that they lie in.

    Args:
        run: runs a command and returns what it prints, or None.
    """

    EVERYBODY = ("S-1-1-0", "S-1-5-11", "S-1-5-32-545")
    """Everyone, authenticated users, and the users of this machine."""

    def __init__(self, run: Callable[[Sequence[str]], str | None] = _run) -> None:
        self._run = run

    def protect(self, path: Path) -> None:
        user, domain = os.environ.get("USERNAME", ""), os.environ.get("USERDOMAIN", "")
        if not user:
            logger.warning("%s keeps the access list of its folder: USERNAME is not set", path)
            return
        inherited = "(OI)(CI)" if path.is_dir() else ""
        who = f"{domain}\\{user}" if domain else user
        grant = f"{who}:{inherited}F"
        self._run(["icacls", str(path), "/inheritance:r", "/grant:r", grant])

    def exposed(self, path: Path, descriptor: int) -> tuple[str, str] | None:
        for group in self.EVERYBODY:
            found = self._run(["icacls", str(path), "/findsid", f"*{group}"])
            if found is None:
                return None
            if str(path) in found:  # it is named only where the group has rights on it
                return (
                    f"can be read or changed by other users (the group {group} has rights on it)",
                    f'If nobody read it: icacls "{path}" /inheritance:r /grant:r %USERNAME%:F. '
                    "Otherwise revoke it and invite anew.",
                )
        return None


def protection() -> Protection:
    """That of this system."""
    return Modes() if hasattr(os, "geteuid") else AccessLists()


def private_folder(path: Path) -> None:
    """Make a folder that only its owner can enter; one that is there already stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    if not path.is_dir():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        protection().protect(path)


def data_home() -> Path:
    """The folder for what programs keep for a user."""
    named = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(named) if named else Path.home() / ".local" / "share"
