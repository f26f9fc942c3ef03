"""Runs ``fedft`` as if only what Windows has were there: ``python bare.py ARGUMENTS of fedft``.

Our own modules see an ``os``, ``signal``, ``time``, ``mmap`` and ``sys`` without what only Unix has
(the names are typeshed's, all that it marks so), no module of Unix alone, no /proc, and a
``msvcrt``. The libraries below see the machine as it is: they have their own ports. Text files that
are opened in the system's own encoding are an error.

``python bare.py -c CODE`` runs code as if it were a module of ours. ``--`` stands between commands.
"""

import builtins
import fcntl
import mmap
import os
import pathlib
import signal
import sys
import time
import types
import warnings
from typing import Any

OURS = ("fedft",)
MODULES = [
    "crypt",
    "fcntl",
    "grp",
    "nis",
    "posix",
    "pty",
    "pwd",
    "resource",
    "spwd",
    "syslog",
    "termios",
    "tty",
]
GONE = {
    "os": """
        CLD_CONTINUED CLD_DUMPED CLD_EXITED CLD_KILLED CLD_STOPPED CLD_TRAPPED EFD_CLOEXEC
        EFD_NONBLOCK EFD_SEMAPHORE EX_CANTCREAT EX_CONFIG EX_DATAERR EX_IOERR EX_NOHOST EX_NOINPUT
        EX_NOPERM EX_NOUSER EX_OSERR EX_OSFILE EX_PROTOCOL EX_SOFTWARE EX_TEMPFAIL EX_UNAVAILABLE
        EX_USAGE F_LOCK F_TEST F_TLOCK F_ULOCK GRND_NONBLOCK GRND_RANDOM MFD_CLOEXEC NGROUPS_MAX
        O_ACCMODE O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_FSYNC O_LARGEFILE O_NDELAY
        O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_RSYNC O_SYNC O_TMPFILE PRIO_PGRP
        PRIO_PROCESS PRIO_USER P_ALL P_PGID P_PID P_PIDFD RTLD_GLOBAL RTLD_LAZY RTLD_LOCAL RTLD_NOW
        SCHED_BATCH SCHED_FIFO SCHED_IDLE SCHED_OTHER SCHED_RR SEEK_DATA SEEK_HOLE ST_RDONLY
        WCONTINUED WCOREDUMP WEXITED WEXITSTATUS WIFCONTINUED WIFEXITED WIFSIGNALED WIFSTOPPED
        WNOHANG WNOWAIT WSTOPPED WSTOPSIG WTERMSIG WUNTRACED XATTR_CREATE XATTR_REPLACE chown chroot
        confstr copy_file_range ctermid environb eventfd fchdir fchmod fchown fdatasync fork forkpty
        fpathconf fstatvfs fwalk get_blocking getegid getenvb geteuid getgid getgrouplist getgroups
        getloadavg getpgid getpgrp getpriority getrandom getresgid getresuid getsid getuid getxattr
        initgroups killpg lchown listxattr lockf major makedev memfd_create minor mkfifo mknod nice
        openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp
        pread preadv pwrite pwritev readv register_at_fork removexattr sched_getaffinity
        sched_getparam sched_getscheduler sched_setaffinity sched_setscheduler sched_yield sendfile
        set_blocking setegid seteuid setgid setgroups setpgid setpgrp setpriority setregid setresgid
        setresuid setreuid setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp tcsetpgrp
        ttyname uname wait wait3 wait4 waitid writev""",
    "signal": """
        ITIMER_PROF ITIMER_REAL ITIMER_VIRTUAL SIGALRM SIGBUS SIGCHLD SIGCLD SIGCONT SIGHUP SIGIO
        SIGIOT SIGKILL SIGPIPE SIGPOLL SIGPROF SIGPWR SIGQUIT SIGRTMAX SIGRTMIN SIGSTKFLT SIGSTOP
        SIGSYS SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIGXCPU
        SIGXFSZ SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm getitimer pause pthread_kill pthread_sigmask
        setitimer siginterrupt sigpending sigtimedwait sigwait sigwaitinfo""",
    "time": """
        CLOCK_BOOTTIME CLOCK_MONOTONIC CLOCK_PROCESS_CPUTIME_ID CLOCK_REALTIME
        CLOCK_THREAD_CPUTIME_ID clock_getres clock_gettime clock_gettime_ns clock_settime
        clock_settime_ns pthread_getcpuclockid tzset""",
    "mmap": "MADV_DONTNEED MADV_NORMAL MADV_RANDOM MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
    "sys": "getdlopenflags setdlopenflags abiflags",
}
ROOTS = ("/proc", "/sys", "/dev/shm")


class Without(types.ModuleType):
    """A module that lacks some names, and has others instead."""

    def __init__(self, module: Any, gone: str, instead: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__["_hidden"] = (module, frozenset(gone.split()), instead)

    def __getattr__(self, name: str) -> Any:
        module, gone, instead = self.__dict__["_hidden"]
        if name in gone:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r} on Windows")
        return instead[name] if name in instead else getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_hidden"][0], name, value)


def locking(descriptor: int, mode: int, size: int) -> None:
    """As ``msvcrt`` does it: from where the file stands, and *permission denied* if it is held."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, size, 0, os.SEEK_CUR)
    except OSError as held:
        raise PermissionError(13, "Permission denied") from held


def install() -> None:
    """Hide what only Unix has, from here on."""
    msvcrt = types.ModuleType("msvcrt")
    msvcrt.LK_NBLCK, msvcrt.locking = 2, locking  # type: ignore[attr-defined]
    instead: dict[str, dict[str, Any]] = {
        "os": {"name": "nt", "O_BINARY": 0, "O_NOINHERIT": os.O_CLOEXEC},
        "sys": {"platform": "win32"},
    }
    real = {"os": os, "signal": signal, "time": time, "mmap": mmap, "sys": sys}
    ours: dict[str, Any] = {
        name: Without(module, GONE[name], instead.get(name, {})) for name, module in real.items()
    }
    ours["msvcrt"] = msvcrt
    find = builtins.__import__

    def importing(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        asking = str((globals or {}).get("__name__", "")).split(".")[0]
        if asking in OURS and level == 0:
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in ours:
                return ours[name]
        return find(name, globals, locals, fromlist, level)

    builtins.__import__ = importing
    stat = pathlib.Path.stat

    def look(self: pathlib.Path, **options: Any) -> os.stat_result:
        if str(self).startswith(ROOTS):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return stat(self, **options)

    pathlib.Path.stat = look  # type: ignore[method-assign]
    sys.addaudithook(_guard)
    warnings.filterwarnings("error", category=EncodingWarning, module=f"({'|'.join(OURS)})\\b")


def _guard(event: str, args: tuple[Any, ...]) -> None:
    if event != "open" or not isinstance(args[0], str) or not args[0].startswith(ROOTS):
        return
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in ("pathlib", "io", "codecs"):
        frame = frame.f_back
    if frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] in OURS:
        raise FileNotFoundError(2, "No such file or directory", args[0])


def main() -> None:
    """Run one command, or several."""
    install()
    commands: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    for command in commands:
        if command[0] == "-c":
            exec(compile(command[1], "<code>", "exec"), {"__name__": "fedft.clients.code"})
            continue
        from fedft.cli import main as fedft

        sys.argv[1:] = command
        try:
            fedft()
        except SystemExit as left:
            if left.code not in (0, None):
                raise


if __name__ == "__main__":
    main()
