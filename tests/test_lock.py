"""One holder at a time, and none that is dead."""

import multiprocessing
import os
import signal

import pytest

from src.errors import UserError
from src.lock import Lock


def hold(folder, ready, release):
    lock = Lock(folder)
    ready.set()
    release.wait()
    lock.release()


def test_a_lock_dies_with_its_holder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"is being trained in by process {holder.pid} on "):
        Lock(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / ".lock").exists()
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_whoever_releases_lets_the_next_in(tmp_path):
    first = Lock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    first.release()
    second = Lock(tmp_path)
    second.release()


def test_a_lock_file_that_was_taken_away_is_no_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it, its last holder may remove it: then the lock is on nothing."""
    calls = []
    is_there = Lock._is_there

    def taken_away_once(self):
        calls.append(None)
        if len(calls) == 1:
            self.path.unlink()
        return is_there(self)

    monkeypatch.setattr(Lock, "_is_there", taken_away_once)
    lock = Lock(tmp_path)
    assert len(calls) == 2
    assert (tmp_path / ".lock").exists()
    lock.release()
