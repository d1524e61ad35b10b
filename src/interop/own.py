"""Our own .safetensors: the network's tensors under their names, and the run's configuration in the metadata."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import UserError
from src.interop.source import Source

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config"  # of the metadata


def read(path: Path) -> Source:
    """A file that `write` wrote.

    Raises:
        UserError: when it is damaged, or holds no configuration.
    """
    from src.interop.weights import TEXTS, read_header, read_tensors

    metadata = read_header(path).get(TEXTS, {})
    config = configuration(metadata, path)
    if config is None:
        raise UserError(
            f"{path} holds weights and not the network they are of; python -m src.convert makes a run of it, and "
            "python -m src.export format=safetensors writes files that hold both"
        )
    return Source({"model": config["model"]}, path, lambda model: read_tensors(path), config)


def configuration(metadata: dict[str, str], path: Path) -> dict[str, Any] | None:
    """The run's configuration in the metadata of the file `path`; None where there is none.

    Raises:
        UserError: when it would call what is not of this project.
    """
    from src.runs import PARTS
    from src.trust import check_known

    try:
        config = json.loads(metadata.get(CONFIG, "null"))
    except ValueError:
        return None
    if not isinstance(config, dict) or not config.keys() >= PARTS or not isinstance(config["model"], dict):
        return None
    check_known(config, path)
    return config


def write(state: "dict[str, Tensor]", config: dict[str, Any], path: Path) -> None:
    """The network's state, with the run's configuration."""
    from src.interop.weights import write_safetensors

    own_memory = {key: v.contiguous().clone() for key, v in state.items()}
    write_safetensors(own_memory, path, {CONFIG: json.dumps(config)})
