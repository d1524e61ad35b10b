"""Several processes that do one job: what a launcher tells them, and how all end when one fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.processes import ALONE, Group, count, joined, on_devices
from src.start import start

ROOT = Path(__file__).resolve().parents[1]
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
WORK = """
import os, signal, time
from src.errors import UserError
from src.processes import joined
with joined() as group:
    with group.agreement():
        {failure}
    print(group.gather([f"{{k}} of {{group.rank}}" for k in group.share(range(7))]))
"""


@pytest.fixture
def several(capfd):
    """Runs WORK in three processes of one group, with what is to fail, and returns how that ended."""

    def run(failure: str = "pass") -> tuple[object, str, str]:
        before, there = Path.cwd(), ROOT
        os.chdir(there)
        capfd.readouterr()
        ended: object = None
        try:
            start([sys.executable, "-c", WORK.format(failure=failure)], 3)
        except (UserError, SystemExit) as error:
            ended = error
        finally:
            os.chdir(before)
        return ended, *capfd.readouterr()

    return run


def test_what_all_have_made_comes_to_the_first_in_order(several):
    ended, out, err = several()
    assert (ended, err) == (None, "")
    assert out == "['0 of 0', '1 of 1', '2 of 2', '3 of 0', '4 of 1', '5 of 2', '6 of 0']\n"


def test_an_error_of_one_is_the_error_of_all_and_told_once(several):
    ended, out, err = several("if group.rank == 2: raise UserError('the third is broken')")
    assert isinstance(ended, UserError)
    assert str(ended) == "the third is broken"
    assert (out, err) == ("", "")


def test_a_crash_of_one_ends_all_and_shows_its_traceback(several):
    ended, out, err = several("if group.rank == 1: [][0]")
    assert isinstance(ended, SystemExit)
    assert ended.code == 1
    assert err.count("IndexError: list index out of range") == 1
    assert out == ""


def test_one_that_is_killed_ends_all(several):
    began = time.monotonic()
    ended, _, _ = several(
        "if group.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n        import time; time.sleep(60)"
    )
    assert time.monotonic() - began < 40
    assert isinstance(ended, UserError)
    assert "process 1 of 3 was ended by signal 9 (Killed)" in str(ended)


def test_all_end_with_the_process_that_started_them():
    sleeper = "import os, time; from src.processes import joined\n"
    sleeper += "with joined() as group: print(os.getpid(), flush=True); time.sleep(60)"
    script = f"import sys; from src.start import start; start([sys.executable, '-c', {sleeper!r}], 2)"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    first = parent.stdout.readline().strip()
    parent.kill()
    parent.wait()
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", first], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return
        time.sleep(0.1)
    raise AssertionError("the first process has outlived its parent")


def test_one_that_is_alone_joins_nothing(monkeypatch):
    for name in (*MASTER, "RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with joined() as group:
        assert group == ALONE
        assert group.gather(group.share([3, 1, 4])) == [3, 1, 4]
        assert not torch.distributed.is_initialized()


def test_devices_are_gpus_where_gpus_are_meant(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (count("auto", "auto"), count("auto", "cuda"), count(3, "auto")) == (4, 4, 3)
    assert (count("auto", "cpu"), count(9, "cpu")) == (1, 9)
    with pytest.raises(UserError, match="devices=5 asks for 5 GPUs and this machine has 4"):
        count(5, "cuda")
    with pytest.raises(UserError, match="devices=0 must be at least 1, or auto"):
        count(0, "cpu")


def test_a_launcher_has_counted_already(monkeypatch):
    monkeypatch.setattr("src.processes.launched", lambda: None)
    started = []
    monkeypatch.setattr("src.processes.start", lambda command, processes: started.append((command, processes)))
    on_devices(lambda group: None, lambda: ["again"], 2, "cpu")
    assert started == [(["again"], 2)]
    done: list[Group] = []
    on_devices(done.append, lambda: ["again"], 1, "cpu")
    assert done == [ALONE]
