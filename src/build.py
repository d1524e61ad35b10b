"""From a configuration to objects: constructors are the schema.

A node with `_target_` is a call: its other keys are the arguments. Before anything is built, `check` holds every node
against the signature and the annotations of its target, so that a typo or a wrong type is one sentence at the start
and not a traceback in the middle. Nodes are plain dicts; nothing here knows Hydra.
"""

import difflib
import importlib
import inspect
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from src.errors import UserError

SPECIAL = ("_target_", "_partial_")


def build(node: Mapping[str, Any], path: str, /, **runtime: Any) -> Any:
    """Calls the node's target with its arguments and, for those it leaves out, the objects in `runtime`.

    Args:
        node: a checked node with `_target_`; with `_partial_: true` a functools.partial is returned.
        path: where the node stands in the configuration, for messages.
        runtime: arguments that no configuration can hold, such as another object.

    Raises:
        UserError: when the target refuses its arguments with a ValueError.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{path} has no _target_ to build; choose an option of its group, or give {path}._target_=...")
    target = locate(node["_target_"], path)
    arguments = {key: _as_argument(value, join(path, key)) for key, value in node.items() if key not in SPECIAL}
    call = partial(target, **arguments, **runtime)
    if node.get("_partial_"):
        return call
    try:
        inspect.signature(target).bind(**arguments, **runtime)
    except TypeError as error:
        raise UserError(f"{path}: {error}; do not delete settings, set them") from error
    with refusals(path):
        return call()


@contextmanager
def refusals(path: str) -> Iterator[None]:
    """Turns a ValueError of the block, which says what a constructor refuses, into a UserError that says where."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def check(node: Any, path: str) -> None:
    """Checks a node and all below it.

    Raises:
        UserError: for an unknown key (with the nearest names), a missing or a wrongly typed value.
    """
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        check_arguments(locate(node["_target_"], path), node, path)
    for key, value in node.items():
        check(value, join(path, key))


def check_value(name: str, value: Any, hint: Any) -> None:
    """Refuses a plain value of another type than an annotation says."""
    if not _fits(value, hint):
        raise UserError(f"{name}={_show(value)} is not {_describe(hint)}")


def check_arguments(target: Any, arguments: Mapping[str, Any], path: str) -> None:
    """Checks keys and values against the target's parameters and their annotations."""
    hints = _hints(target)
    names = list(inspect.signature(target).parameters)
    if inspect.isclass(target) and is_dataclass(target):
        for field in fields(target):
            if field.default is MISSING and field.name not in arguments:
                raise UserError(f"the setting {join(path, field.name)} is missing; do not delete it, set it")
    for key, value in arguments.items():
        if key in SPECIAL:
            continue
        if key not in names:
            raise UserError(unknown_key(join(path, key), key, names))
        if value == "???":
            raise UserError(f"{join(path, key)} has no value; set it with {join(path, key)}=...")
        if key in hints:
            check_value(join(path, key), value, hints[key])


def unknown_key(full: str, key: str, names: Iterable[str]) -> str:
    """The sentence for a key that does not exist."""
    names = sorted(names)
    nearest = difflib.get_close_matches(key, names, n=3)
    prefix = full.removesuffix(key)
    hint = f"did you mean {' or '.join(prefix + n for n in nearest)}?" if nearest else f"there are {', '.join(names)}"
    return f"there is no setting {full}; {hint}"


def locate(target: str, path: str) -> Any:
    """The object behind a dotted name.

    Raises:
        UserError: when it cannot be imported.
    """
    if target == "???":
        raise UserError(f"{path}._target_ has no value; set it with {path}._target_=<module>.<class>")
    module, _, name = str(target).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path}._target_={target!r} cannot be imported: {error}") from error


def check_seed(path: str, seed: int) -> None:
    """Refuses a seed that no random generator takes."""
    if not 0 <= seed < 2**63:
        raise UserError(f"{path}={seed} must lie between 0 and 2^63 - 1")


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


@cache
def _hints(target: Any) -> dict[str, Any]:
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a foreign signature that cannot be read is not checked
        return {}
    return hints


def _as_argument(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return (
            build(value, path) if "_target_" in value else {k: _as_argument(v, join(path, k)) for k, v in value.items()}
        )
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may be given where `hint` is expected; hints that no configuration can meet fit all."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str)
    if isinstance(hint, type) and issubclass(hint, str):  # a text of a form that its constructor knows
        try:
            return bool(hint(value))
        except ValueError:
            return False
    if origin is tuple and Ellipsis not in get_args(hint):
        options = get_args(hint)
        return isinstance(value, list | tuple) and len(value) == len(options) and all(map(_fits, value, options))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return isinstance(value, Mapping)
    return hint is Any or isinstance(value, Mapping)


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if origin is tuple and Ellipsis not in get_args(hint):
        return f"[{', '.join(_describe(option) for option in get_args(hint))}]"
    if origin in (list, tuple, Sequence):
        return f"a list, each {_describe(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a group"}
    names[type(None)] = "null"
    return names.get(hint, getattr(hint, "described", getattr(hint, "__name__", str(hint))))


def _show(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
