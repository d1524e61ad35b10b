"""Processes that work through chunks of numbers side by side, and hand back what they made in order.

They are started anew (spawned), so that they hold none of this process's files, locks or threads, and end when it dies,
however it dies: each reads its tasks from a pipe whose other end only this process has.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from src.errors import UserError

Work = Callable[[range], Any]
AHEAD = 3  # chunks that a process has been handed or has made, and nobody has taken


def in_order(work: Work, chunks: Sequence[range], processes: int) -> Iterator[tuple[range, Any]]:
    """Each chunk and what `work` makes of it, in the order of the chunks.

    Args:
        work: can be pickled; is called in another process, of fewer than two processes in this one.
        processes: how many at the same time; memory holds 3 chunks of each, whatever their number.

    Raises:
        UserError: when a process dies (the system takes it away when memory is short), with the chunk it was at.
        Exception: whatever `work` raised.
    """
    if processes < 2 or len(chunks) < 2:
        for chunk in chunks:
            yield chunk, work(chunk)
        return
    crew = _Crew(work, min(processes, len(chunks)))
    try:
        yield from crew.run(chunks)
    finally:
        crew.end()


class _Crew:
    def __init__(self, work: Work, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            with _one_thread():
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, chunks: Sequence[range]) -> Iterator[tuple[range, Any]]:
        made: dict[int, Any] = {}
        at: dict[Connection, list[int]] = {pipe: [] for pipe in self._pipes}
        handed = taken = 0
        while taken < len(chunks):
            while handed < len(chunks) and handed - taken < AHEAD * len(self._pipes):
                pipe = min(self._pipes, key=lambda pipe: len(at[pipe]))
                at[pipe].append(handed)
                with contextlib.suppress(OSError):  # it died, which is met below
                    pipe.send(chunks[handed])
                handed += 1
            while taken not in made:
                ready: Any = wait([pipe for pipe in self._pipes if at[pipe]])
                for pipe in ready:
                    try:
                        result = pipe.recv()
                    except (EOFError, OSError) as error:
                        raise self._died(pipe, chunks[at[pipe][0]]) from error
                    made[at[pipe].pop(0)] = result
            result = made.pop(taken)
            if isinstance(result, _Raised):
                raise result.error
            yield chunks[taken], result
            taken += 1

    def _died(self, pipe: Connection, chunk: range) -> UserError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(5)
        return UserError(
            f"a process that decodes images {chunk.start} to {chunk.stop - 1} died (exit code {process.exitcode}), as "
            "happens when memory runs out; give it more memory, or fewer processes"
        )

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _serve(pipe: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal: the first process decides
    with contextlib.suppress(EOFError, OSError):  # it is gone
        while True:
            chunk = pipe.recv()
            try:
                result = work(chunk)
            except Exception as error:
                result = _Raised(error)
            pipe.send(result)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that are started here compute in one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
