"""A thread that fetches ahead."""

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 0.1  # seconds until a thread that waits for room looks whether it is still wanted


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, of which a thread holds up to `depth` ready; it ends with the iterator that this returns.

    Raises:
        Exception: whatever `items` raises, when its turn has come.
    """
    queue: Queue[tuple[Any, BaseException | None, bool]] = Queue(depth)
    over = Event()

    def put(item: Any, error: BaseException | None = None, last: bool = False) -> None:
        while not over.is_set():
            try:
                queue.put((item, error, last), timeout=PATIENCE)
                return
            except Full:
                pass

    def fetch() -> None:
        try:
            for item in items:
                put(item)
                if over.is_set():
                    return
            put(None, last=True)
        except BaseException as error:  # raised where the items are used
            put(None, error)

    thread = Thread(target=fetch, name="fetches ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = queue.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        over.set()
        thread.join()
