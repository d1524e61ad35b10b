"""Commands in processes of their own that begin at once: forks of a server that has imported everything.

Importing torch and Lightning takes an interpreter longer than a small training. What is forked is a real process, with
its own pid, session, signals and exit code; only the interpreter is not a new one. Each command has a test, too, that
begins with `python -m`.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("src.cli", "src.training.fit", "src.training.checkpoint", "src.training.samples", "src.models.unet"),
        *("src.evaluation.sampling", "torch.distributed.run", "tests.faults"),
        *("hydra_plugins.hydra_joblib_launcher.joblib_launcher", "hydra_plugins.hydra_submitit_launcher.config"),
    ]
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(
    *arguments: str,
    output: Path,
    command: str = "train",
    launcher: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """`python <launcher> -m src.<command> <arguments>` with one thread; all that it prints is added to a file.

    Args:
        env: takes the place of the environment.
    """
    return call(main, [*launcher, "-m", f"src.{command}", *arguments], output=output, env=env)


def call(
    function: Callable[..., None], *arguments: Any, output: Path, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A function in such a process, in which all that is started as `python -m` is forked, too."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"} if env is None else dict(env)
    process = SERVER.Process(target=_called, args=(function, arguments, output, environ))
    process.start()
    return process


def main(words: list[str]) -> None:
    """What `python <words>` does, for -m <module> <arguments>."""
    _, module, *arguments = words
    sys.argv = [module, *arguments]
    warnings.filterwarnings("ignore", message=".*found in sys.modules")  # of runpy, for what the server has imported
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def finish(*arguments: str, output: Path, timeout: float = 300, **settings: Any) -> int:
    """The exit code of what `start` starts, negative for a signal."""
    process = start(*arguments, output=output, **settings)
    join(process, output, timeout)
    assert process.exitcode is not None
    return process.exitcode


def join(process: ForkServerProcess, output: Path, timeout: float) -> None:
    """Waits for the end.

    Raises:
        TimeoutError: when it does not come; the process is killed.
    """
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"no end after {timeout} s: {output.read_text()[-2000:]}")


def wait_for(condition: Callable[[], bool], process: ForkServerProcess, timeout: float = 120) -> None:
    """Until the condition holds, or the process has ended."""
    deadline = time.monotonic() + timeout
    while not condition() and process.is_alive():
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError("what was waited for did not come")
        time.sleep(0.01)


def running(pid: int) -> bool:
    """Whether a process is there and more than an entry that nobody has collected."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


class Fork(subprocess.Popen):
    """A Popen whose `python -m <module>` is a fork of this process; any other program is started as always."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        words = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else []
        if words[:1] != [sys.executable] or "-m" not in words[1:3]:
            super()._execute_child(args, *rest)
            return
        cwd, env, pipes, new_session = rest[4], rest[5], rest[9:15], rest[20]
        stdin, _, _, stdout, _, stderr = pipes
        sys.stdout.flush()
        sys.stderr.flush()
        with _signals_held():
            self.pid = os.fork()
            if self.pid == 0:
                _forked(words[words.index("-m") :], cwd, env, (stdin, stdout, stderr), new_session)
        self._child_created = True
        self._close_pipe_fds(*pipes)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forked(
    words: list[str], cwd: str | None, env: Mapping[str, str] | None, streams: Sequence[int], new_session: bool
) -> NoReturn:
    """Makes this fork what a new interpreter would have been, and never returns."""
    code: Any = 1
    atexit._clear()  # among what was asked for is the end of the parent's temporary folders
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if new_session:
            os.setsid()
        for number, stream in enumerate(streams):
            if stream != -1:
                os.dup2(stream, number)
        _close_all_but_the_first_three()
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        import torch
        from hydra.core.global_hydra import GlobalHydra

        torch.set_num_threads(1)  # makes anew what a fork spoils, which two threads at once would both try
        GlobalHydra.instance().clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        code = main(words)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        _leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit((code or 0) & 255)


def _leave() -> None:
    """What an interpreter does at its end, and a fork would leave out."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _close_all_but_the_first_three() -> None:
    """Their numbers stay taken: Python objects of before, when they are collected, would close what is new there."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        with contextlib.suppress(OSError):  # that of the folder itself, which is closed by now
            if number > 2:
                os.fstat(number)
                os.dup2(nothing, number, inheritable=False)


def _called(function: Callable[..., None], arguments: Sequence[Any], output: Path, environ: Mapping[str, str]) -> None:
    """In a process of the server, whose children are forked, too."""
    gc.freeze()  # what was imported is no garbage, and looking through it again and again takes half a second
    os.setsid()
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    torch.set_num_threads(1)
    subprocess.Popen = subprocess_handler.Popen = Fork  # type: ignore[misc]
    try:
        function(*arguments)
    finally:
        _leave()
