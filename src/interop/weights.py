"""Files of tensors, read without executing anything that they hold."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.errors import UserError, reason

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
NESTED = ("ema", "model_ema", "state_dict", "model", "net")  # where others keep the state in a file with more in it
TEXTS = "__metadata__"  # of a safetensors header
INDEX = ".index.json"  # ends the name of a file that says which files the tensors lie in
LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or a torch file, or of all that an index of parts names, on the CPU.

    Raises:
        UserError: when it is damaged, is neither, or holds a pickle with more than tensors in it.
    """
    if path.name.endswith(INDEX):
        return {key: tensor for part in parts(path) for key, tensor in read_tensors(part).items()}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        read_header(path)
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises anything
        unsafe = re.search(r"unsupported (?:global|class|operand)[^\n]*?([\w.]+\.\w+)", str(error), re.IGNORECASE)
        if (unsafe or "unsupported" in str(error).lower()) and _is_pickle(path):
            what = f" ({unsafe[1]})" if unsafe else ""
            raise UserError(
                f"{path} is a pickle that holds more than tensors{what}, and what is in a pickle is never executed "
                "here; save its state dict with safetensors.torch.save_file where you trust it, and give that file"
            ) from error
        raise _damaged(path, error) from error
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict, names with tensors; give a file that does")
    return {str(key): value for key, value in content.items()}


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: names with types, shapes and places, and texts under "__metadata__".

    Raises:
        UserError: when it is no such file, or shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > LARGEST_HEADER:
                raise ValueError("its first bytes are no length of a header")
            header = json.loads(file.read(size))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != TEXTS), default=0)
        if not all(isinstance(text, str) for text in header.get(TEXTS, {}).values()):
            raise ValueError(f"its {TEXTS} holds more than texts")
        if path.stat().st_size != 8 + size + end:
            raise ValueError(f"it has {path.stat().st_size} bytes and its header asks for {8 + size + end}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(path, error) from error
    return header


def parts(index: Path) -> list[Path]:
    """The files that an index says the tensors lie in, beside it.

    Raises:
        UserError: when it names none, or one that is not there.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        beside = [n for n in names if Path(n).name == n and not n.endswith(INDEX) and (index.parent / n).is_file()]
        missing = [name for name in names if name not in beside]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from error
    if missing or not names:
        what = f"names {missing[0]}, which is not beside it" if missing else "names no files"
        raise UserError(f"{index} {what}; download or export it again, all of its files")
    return [index.parent / name for name in names]


def _is_pickle(path: Path) -> bool:
    """Whether a file that could not be read begins as one of torch's does, and not as a text."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


def write_safetensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Tensors in the order of their names, with texts."""
    from safetensors.torch import save_file

    from src.files import replacing

    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **metadata})


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} is damaged or not a file of weights ({reason(error)}); download or export it again")
