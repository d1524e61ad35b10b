"""error.txt: why a run ended before its time, for whoever finds its folder later."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from src.failures import sentence
from src.runs import ERROR
from src.training.stop import Stopped


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Leaves one sentence in the folder when the block ends by an error or a signal, and none when it ends well."""
    path = folder / ERROR
    with suppress(OSError):
        path.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # on a full disk, which may be the error
            path.write_text(f"{error if isinstance(error, Stopped) else sentence(error)}\n")
        raise
