"""Children of the host are free of what other tests have left; the controls show that it matters."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import FAILED, Forks, only_thread

LOCK = threading.Lock()


@pytest.fixture
def forks() -> Iterator[Forks]:
    """A host of its own, since some of these tests spoil it."""
    host = Forks()
    yield host
    host.close()


@pytest.fixture
def held() -> Iterator[None]:
    """A lock that another thread of this process holds, as a pool of a library may."""
    holds, done = threading.Event(), threading.Event()

    def hold() -> None:
        with LOCK:
            holds.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    yield
    done.set()
    thread.join()


def take(out: Path) -> None:
    with LOCK:
        out.write_text("taken")


def fail() -> None:
    raise ValueError("by itself")


def sleep() -> None:
    time.sleep(600)


def spoil() -> None:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def spoil_unseen_by_python() -> int:
    """OpenMP's threads, of which Python's own list knows nothing."""
    import torch

    torch.set_num_threads(2)
    torch.ones(1 << 20).add(1)
    return threading.active_count()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_lock_that_is_held_here_is_free_in_a_child_of_the_host(
    forks: Forks, held: None, tmp_path: Path
) -> None:
    assert forks.run(take, tmp_path / "host") == 0
    assert (tmp_path / "host").read_text() == "taken"
    child = os.fork()  # the control, killed below: it waits for the lock and does nothing else
    if child == 0:
        take(tmp_path / "fork")
        os._exit(0)
    time.sleep(0.5)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it hangs"
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (tmp_path / "fork").exists()


def test_a_host_with_a_second_thread_does_not_fork(forks: Forks, tmp_path: Path) -> None:
    assert forks.run(take, tmp_path / "before") == 0
    forks.here(spoil)
    with pytest.raises(RuntimeError, match="forks has one thread"):
        forks.run(take, tmp_path / "after")
    assert not (tmp_path / "after").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="seen by Linux alone")
def test_threads_of_libraries_are_seen(forks: Forks, tmp_path: Path) -> None:
    assert forks.here(spoil_unseen_by_python) == 1
    with pytest.raises(RuntimeError, match="forks has one thread"):
        forks.run(take, tmp_path / "after")


def test_how_a_child_ended_is_told(forks: Forks) -> None:
    assert os.waitstatus_to_exitcode(forks.run(fail)) == FAILED
    children = [forks.start(sleep) for _ in range(2)]
    ends = [os.waitstatus_to_exitcode(forks.wait(child, 0.0)) for child in children]
    assert ends == [-signal.SIGKILL] * 2
    with pytest.raises(RuntimeError, match="by itself"):
        forks.here(fail)
    assert forks.here(os.getpid) != os.getpid()


def test_a_host_takes_its_children_with_it() -> None:
    host = Forks()
    child = host.start(sleep)
    host.close()
    for _ in range(500):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[:1]:
            return  # ended; nobody is there to wait for it
        time.sleep(0.01)
    raise AssertionError("it lives on")


def test_only_thread_is_about_this_process(held: None) -> None:
    with pytest.raises(RuntimeError, match="forks has one thread"):
        only_thread()
