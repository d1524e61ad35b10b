"""Files of weights: read without executing what they hold, and compared with the network before they are loaded."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError, reason
from src.files import check_sums

SHOWN = 3  # names that a message holds


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A network's state dict from a .safetensors file or one of torch.save's, on the CPU.

    Raises:
        UserError: when there is no such file, it is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the file of weights, .safetensors or torch.save's")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            if zipfile.is_zipfile(path):
                check_sums(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything
        raise UserError(f"{path} is damaged or holds more than weights ({reason(error)}); use another file") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no state dict, names with tensors; save the network's state_dict()")
    return dict(state)


def fit_state(net: nn.Module, state: Mapping[str, Tensor], path: str | Path, kind: str) -> None:
    """Loads a state dict that has just the network's names and shapes.

    Args:
        kind: the network's name in messages.

    Raises:
        UserError: naming the first that differ.
    """
    expected = net.state_dict()
    lacking = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    other = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if lacking or foreign:
        parts = [f"lacks {_names(lacking)}"] if lacking else []
        parts += [f"has {_names(foreign)}"] if foreign else []
        raise UserError(f"{path} does not hold weights of {kind}: it {', and '.join(parts)}; use the right file")
    if other:
        key = other[0]
        raise UserError(
            f"{path} does not hold weights of {kind}: {key} is {list(state[key].shape)} there and "
            f"{list(expected[key].shape)} in {kind}; use the right file"
        )
    net.load_state_dict(state)


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers: the same wherever and however the tensors are kept."""
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _names(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
