"""A lock ends with the process that took it, and file systems without locks are accepted."""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dftserve import lock

HOLDER = """
import os, signal, sys
from dftserve import lock
file = open(sys.argv[1], "ab")
assert lock.take(file)
if os.fork() == 0:
    os.write(1, b"forked")
    os.read(0, 1)
    os._exit(0)
signal.pause()
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_a_forked_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.read(len(b"forked")) == b"forked"
        with path.open("ab") as file:
            assert not lock.take(file), "the parent holds it"
        holder.kill()
        holder.wait()
        # The child still waits for its input.
        with path.open("ab") as file:
            assert lock.take(file)
        holder.stdin.close()
        assert holder.stdout.read() == b"", "the child has ended"


def test_a_fork_leaves_the_lock_with_the_parent(tmp_path):
    with (tmp_path / "lock").open("ab") as mine, (tmp_path / "lock").open("ab") as other:
        assert lock.take(mine)
        child = os.fork()
        if child == 0:
            os._exit(0 if mine.closed else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not lock.take(other)


def without_locks(number: int):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    return SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)


@pytest.mark.parametrize("number", lock.UNSUPPORTED)
def test_a_file_system_without_locks_gives_one_warning(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(lock, "fcntl", without_locks(number))
    lock._warn_once.cache_clear()
    with (tmp_path / "lock").open("ab") as file:
        assert lock.take(file)
        assert lock.take(file, wait=True)
    assert len(caplog.records) == 1
    assert "has no locks" in caplog.text


def test_other_system_errors_are_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", without_locks(errno.EIO))
    with (tmp_path / "lock").open("ab") as file, pytest.raises(OSError, match="Input/output"):
        lock.take(file)
