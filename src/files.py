"""Files that appear whole or not at all."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, which takes the place of `path` when the block ends well, or vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def shown(path: Path) -> Path:
    """The path as a reader wants it: relative when it lies below the working directory."""
    absolute = path.resolve()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path


def as_override(key: str, path: Path) -> str:
    """`key=path` as a shell and Hydra both read it."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII) and not text.isdigit():
        return f"{key}={text}"
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return shlex.quote(f"{key}='{escaped}'")
