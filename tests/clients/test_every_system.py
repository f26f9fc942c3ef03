"""A client on Windows and macOS, as far as that can be shown on Linux: see ``bare.py``."""

import os
import pkgutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import fedft
from fedft.core import system
from fedft.core.errors import SecurityRefusal
from fedft.core.link.secrets import Kit, read_private, write_private
from fedft.server import identity
from fedft.server.config_file import parse_config
from fedft.server.run import simulate

BARE = Path(__file__).with_name("bare.py")
ICACLS = """#!/bin/sh
# Access lists, kept as modes.
printf '%s\\n' "$*" >> "$(dirname "$0")/called"
case "$2" in
/findsid) case "$(stat -c %a "$1")" in ?00) ;; *) echo "SID Found: $1." ;; esac ;;
*) if [ -d "$1" ]; then chmod 700 "$1"; else chmod 600 "$1"; fi ;;
esac
"""


@pytest.fixture
def windows(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that is to believe so."""
    folder = tmp_path / "system32"
    folder.mkdir()
    program = folder / "icacls"
    program.write_text(ICACLS)
    program.chmod(0o755)
    return {
        **{k: v for k, v in os.environ.items() if k != "XDG_DATA_HOME"},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "USERNAME": "ann",
        "USERDOMAIN": "LAB",
        "LOCALAPPDATA": str(tmp_path / "local"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "cp1252",
        "PYTHONPATH": str(Path(fedft.__file__).parents[1]),
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-X", "warn_default_encoding", str(BARE), *arguments]


def bare(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment,
        capture_output=True,
        encoding="cp1252",
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import fcntl", "No module named 'fcntl'"),
        ("import pwd", "No module named 'pwd'"),
        ("import os; os.O_NOFOLLOW", "no attribute 'O_NOFOLLOW'"),
        ("import os; os.geteuid()", "no attribute 'geteuid'"),
        ("import os; os.register_at_fork(before=print)", "no attribute 'register_at_fork'"),
        ("from os import fork", "cannot import name 'fork'"),
        ("import signal; signal.SIGKILL", "no attribute 'SIGKILL'"),
        ("from pathlib import Path; Path('/proc/self/status').read_bytes()", "No such file"),
        ("open('/proc/self/status', 'rb')", "No such file"),
        ("open(__import__('os').devnull)", "EncodingWarning"),
        ("print('→')", "UnicodeEncodeError"),
    ],
)
def test_what_is_hidden_is_missed(code: str, what: str, windows: dict[str, str]) -> None:
    """Positive control of the hiding."""
    ran = bare(windows, "-c", code)
    assert ran.returncode == 1 and what in ran.stderr


def modules(package: Any) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [m.name for m in found if not m.name.endswith("__main__")]


def test_all_of_a_client_is_imported_and_plans_and_reports(
    tiny_table: Callable[..., dict[str, Any]], windows: dict[str, str], tmp_path: Path
) -> None:
    config = parse_config(tiny_table(rounds={"count": 2}))
    run = simulate(config, tmp_path / "run").path
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    every = [name for name in modules(fedft) if not name.startswith("fedft.server")]
    assert {"fedft.clients.join", "fedft.core.system", "fedft.report.page"} <= set(every)
    ran = bare(
        windows,
        *("-c", "import " + ", ".join(every), "--"),
        *("doctor", "--", "plan", str(file), "--", "plan", str(file), "--json", "--"),
        *("report", str(run), "--output", str(tmp_path / "page.html"), "--"),
        *("export", str(run), "--output", str(tmp_path / "adapter"), "--"),  # says "→"
        *("ca", "request", "ann", "--output", str(tmp_path / "ann.csr")),
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000
    [site] = (tmp_path / "local" / "fedft" / "sites").iterdir()
    called = (tmp_path / "system32" / "called").read_text()
    assert f"{site}/.site.key.tmp /inheritance:r /grant:r LAB\\ann:F" in called


@pytest.mark.grpc
def test_it_joins_a_real_server(
    tiny_table: Callable[..., dict[str, Any]],
    tiny_data: Path,
    windows: dict[str, str],
    tmp_path: Path,
) -> None:
    rounds = {"count": 2, "per-round": 1, "evaluate-every": 1}
    config = parse_config(tiny_table(fleet={"clients": 1}, rounds=rounds))
    file, run = tmp_path / "config.toml", tmp_path / "run"
    file.write_text(config.to_toml(), encoding="utf-8")
    serve = ["-m", "fedft", "serve", str(file), "--run-dir", str(run), "--linger", "20"]
    server = subprocess.Popen([sys.executable, *serve], stderr=subprocess.PIPE, text=True)
    try:
        while not (run / "identity" / "address.json").exists():
            assert server.poll() is None, server.stderr and server.stderr.read()
            time.sleep(0.1)
        kit = tmp_path / "ann.kit"
        identity.invite(run, "ann", kit)
        options = ("--data", str(tiny_data), "--site-dir", str(tmp_path / "site"), "--threads", "1")
        model = ("--model", config.model.source)
        join = ["join", str(kit), *options, *model, "--precision", "bf16"]
        kit.chmod(0o644)
        refused = bare(windows, *join)
        assert refused.returncode == 7 and "S-1-1-0 has rights on it" in refused.stderr
        kit.chmod(0o600)
        joined = bare(windows, *join)
        assert joined.returncode == 0, joined.stderr
        assert "joined; waiting for work" in joined.stderr
        _, said = server.communicate(timeout=60)
        assert server.returncode == 0, said
    finally:
        server.kill()
        server.communicate()
    from fedft.core.record.rundir import RunDir

    lines = [line for line in RunDir.open(run).clients() if line["kind"] == "train"]
    assert [line["precision_bits"] for line in lines] == [16.0, 16.0]


# ── the seam ──────────────────────────────────────────────────────────────────────────────────


class Lists:
    """``icacls`` with one list a file: what it would be asked, and what it would answer."""

    def __init__(self) -> None:
        self.rights: dict[str, set[str]] = {}
        self.broken = False

    def __call__(self, line: Sequence[str]) -> str | None:
        if self.broken:
            return None
        program, path, *words = line
        assert program == "icacls"
        held = self.rights.setdefault(path, {"S-1-5-32-545", "LAB\\ann"})
        if words[0] == "/findsid":
            return f"SID Found: {path}.\n" if words[1].removeprefix("*") in held else "none\n"
        assert words[:2] == ["/inheritance:r", "/grant:r"]
        self.rights[path] = {words[2].rpartition(":")[0]}
        return f"processed file: {path}\n"


class TestAccessLists:
    @pytest.fixture
    def lists(self, monkeypatch: pytest.MonkeyPatch) -> Lists:
        monkeypatch.setenv("USERNAME", "ann")
        monkeypatch.setenv("USERDOMAIN", "LAB")
        made = Lists()
        monkeypatch.setattr(system, "protection", lambda: system.AccessLists(made))
        return made

    def test_what_is_written_is_for_its_owner(self, lists: Lists, tmp_path: Path) -> None:
        write_private(tmp_path / "site.key", b"secret")
        assert lists.rights[str(tmp_path / ".site.key.tmp")] == {"LAB\\ann"}
        # Windows keeps a list over a rename; the stand-in has to be told.
        lists.rights[str(tmp_path / "site.key")] = {"LAB\\ann"}
        assert read_private(tmp_path / "site.key") == b"secret"

    @pytest.mark.parametrize("group", system.AccessLists.EVERYBODY)
    def test_what_a_group_of_everybody_can_read_is_refused(
        self, group: str, lists: Lists, tmp_path: Path
    ) -> None:
        path = tmp_path / "ann.kit"
        path.write_bytes(b"")
        lists.rights[str(path)] = {group, "LAB\\ann"}
        with pytest.raises(SecurityRefusal, match=group) as refused:
            read_private(path)
        assert "icacls" in refused.value.fix
        lists.rights[str(path)] = {"LAB\\ann", "S-1-5-18"}
        assert read_private(path) == b""  # positive control

    def test_without_the_program_files_are_as_private_as_their_folder(
        self, lists: Lists, tmp_path: Path
    ) -> None:
        lists.broken = True
        write_private(tmp_path / "site.key", b"secret")
        assert read_private(tmp_path / "site.key") == b"secret"

    def test_a_folder_hands_its_list_down(self, lists: Lists, tmp_path: Path) -> None:
        system.private_folder(tmp_path / "site")
        assert lists.rights[str(tmp_path / "site")] == {"LAB\\ann"}

    def test_a_program_that_is_not_there_is_told_and_survived(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        lists = system.AccessLists()
        monkeypatch.setenv("USERNAME", "ann")
        lists.protect(tmp_path)
        assert lists.exposed(tmp_path, -1) is None
        assert "icacls did not work" in caplog.text


class TestWithoutFlags:
    def test_a_link_is_not_followed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(system, "_NO_LINKS", 0)
        monkeypatch.setattr(system, "_EXTRA", 0)
        (tmp_path / "file").write_bytes(b"x")
        (tmp_path / "link").symlink_to(tmp_path / "file")
        with pytest.raises(OSError, match="symbolic links"):
            system.open_file(tmp_path / "link", os.O_RDONLY)
        os.close(system.open_file(tmp_path / "file", os.O_RDONLY))  # positive control


class TestLocks:
    @pytest.mark.parametrize("windows_too", [False, True])
    def test_one_at_a_time(
        self, windows_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if windows_too:
            monkeypatch.setitem(sys.modules, "msvcrt", _Msvcrt())
            monkeypatch.setattr(system, "_taker", system._windows_taker)
        flags = os.O_RDWR | os.O_CREAT
        first, second = (system.open_file(tmp_path / ".lock", flags) for _ in range(2))
        os.write(first, b"pid\n")
        system.lock(first, wait=False)
        with pytest.raises(BlockingIOError):
            system.lock(second, wait=False)
        assert os.read(second, 9) == b"pid\n"  # the lock keeps nobody from reading who holds it
        waiting = threading.Thread(target=system.lock, args=(second,), kwargs={"wait": True})
        waiting.start()
        os.close(first)
        waiting.join(20)
        assert not waiting.is_alive()
        os.close(second)


class _Msvcrt:
    """Locks of open files, which one process can hold against itself."""

    LK_NBLCK = 2

    @staticmethod
    def locking(descriptor: int, mode: int, size: int) -> None:
        import fcntl

        assert (mode, size) == (2, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) == system._FAR
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise PermissionError(13, "Permission denied") from held


def test_a_site_lives_where_the_system_keeps_such_things(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedft.clients.join import default_folder

    for name in ("XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    kit = Kit("ann", "127.0.0.1:1", "", "", "", "")
    assert default_folder(kit).parent == tmp_path / ".local/share/fedft/sites"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder(kit).parent == tmp_path / "local/fedft/sites"
