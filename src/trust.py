"""What a configuration may call that came inside a file of weights: such a file may be anybody's."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from src.build import locate
from src.errors import UserError

KNOWN = ("src.", "torch.optim.")  # where the classes lie that it may call
OF_TRAINING = ("callbacks", "logger", "optimizer", "lr_schedule")
CALLED = re.compile(r"_target_['\"]?\s*[:=]\s*['\"]?([\w.]+)")


def check_known(config: Mapping[str, Any], file: Any) -> None:
    """Holds a configuration that came inside a file of weights, which may be anybody's, to classes of this project.

    Callbacks, logger, optimiser and its schedule are left aside: they are of a training, and none is built out of a
    file.

    Raises:
        UserError: when it, or one of the overrides that it brings, would call anything else.
    """
    parts = {key: node for key, node in config.items() if key not in OF_TRAINING}
    foreign = [target for target in _targets(parts) if not _known(target)]
    foreign += [o for o in map(str, config.get("overrides") or ()) if not _harmless(o)]
    if foreign:
        raise UserError(
            f"{file} holds a configuration that calls {foreign[0]!r}, and out of a file of weights "
            "only classes of this project are called; the folder of a run of your own may call others"
        )


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _targets(value)


def _harmless(override: str) -> bool:
    """Whether it is a plain setting: no flag, none of Hydra's own, and what it would call is known."""
    key = override.lstrip("+~")
    if key.startswith(OF_TRAINING):
        return True
    called = CALLED.findall(override)
    whole = len(called) == override.count("_target_")
    return not override.startswith("-") and not key.startswith("hydra") and whole and all(map(_known, called))


def _known(target: Any) -> bool:
    """Whether it is a class, defined below one of KNOWN; nothing else is imported to find out."""
    if not isinstance(target, str) or not target.startswith(KNOWN):
        return False
    try:
        found = locate(target, "")
    except UserError:  # of another version of this project: refused where it is built, by name
        return True
    return inspect.isclass(found) and found.__module__.startswith(KNOWN)
