"""Values and settings as Hydra's override grammar, and a shell, read them."""

import re
import shlex
from pathlib import Path
from typing import Any


def plain_value(value: Any) -> str:
    """A value as Hydra's override grammar reads it."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(plain_value, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def as_override(key: str, path: Path) -> str:
    """`key=path` as a shell and Hydra both read it, quoted only where it must be."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII) and not text.isdigit():
        return f"{key}={text}"
    return shlex.quote(f"{key}={plain_value(text)}")
