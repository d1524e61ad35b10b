"""A configuration that takes parts of another's over, and keeps what the user asked for."""

import copy
from typing import Any

WHOLE = ("model",)  # parts whose kind is not the user's to choose: only settings of theirs


def touched(overrides: list[str], part: str) -> bool:
    """Whether the user named an option of a group, or one of its settings."""
    return any(key == part or key.startswith(part + ".") for key in map(_key, overrides))


def adopt(config: dict[str, Any], parts: dict[str, dict[str, Any]], overrides: list[str]) -> dict[str, Any]:
    """The configuration with these nodes in place of its own.

    A setting that the user gave stays; an option of a group that the user chose stays as a whole, but a model's.

    Args:
        overrides: of Hydra, what the user gave.
    """
    merged = copy.deepcopy(config)
    keys = [_key(override) for override in overrides]
    for part, node in parts.items():
        if part in keys and part not in WHOLE:
            continue
        merged[part] = copy.deepcopy(node)
        for key in keys:
            if key.startswith(part + "."):
                _copy(config, merged, key.split("."))
    return merged


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].replace("/", ".")


def _copy(source: Any, target: Any, names: list[str]) -> None:
    """Gives target what source has under a dotted name; what source has not, target loses."""
    *parents, last = names
    for name in parents:
        source, target = source.get(name, {}), target.setdefault(name, {})
    if last in source:
        target[last] = copy.deepcopy(source[last])
    else:
        target.pop(last, None)
