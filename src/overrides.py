"""Values and settings as Hydra's override grammar, and a shell, read them."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from src.build import unknown_key
from src.errors import UserError


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


def option(group: str, name: str) -> dict[str, Any]:
    """What an option of a group holds, conf/<group>/<name>.yaml, where it refers to its own group alone.

    Raises:
        UserError: when there is no such option.
    """
    from omegaconf import OmegaConf

    folder = Path(__file__).resolve().parents[1] / "conf" / group
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(unknown_key(f"{group}={name}", str(name), names).replace("no setting", "no option"))
    plain: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=True)
    parts = plain.pop("defaults", ["_self_"])
    return {key: value for part in parts for key, value in (plain if part == "_self_" else option(group, part)).items()}


def training_command(overrides: list[str]) -> str:
    """What begins a run with these overrides anew, as a shell reads it."""
    kept = [override for override in overrides if not override.startswith("resume=")]  # that is of a folder's run
    return shlex.join(["python", "-m", "src.train", *kept])


INHERITED: list[str] = []  # of the command that runs: what its `run=` brought along, which it brings again


def same_job(name: str, out: Path) -> list[str]:
    """The command line of the job that Hydra runs now, also one of a sweep, as a single job in the folder `out`."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    own = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper")
    kept = [override for override in hydra.overrides.hydra if not override.lstrip("+~").startswith(own)]
    task = list(hydra.overrides.task)
    if INHERITED and task[: len(INHERITED)] == INHERITED:
        task = task[len(INHERITED) :]
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    flags = [text for folder in folders for text in ("--config-dir", folder)]
    settings = [*kept, *task, "hydra.mode=RUN", f"hydra.run.dir={plain_value(str(out.absolute()))}"]
    return [sys.executable, "-m", f"src.{name}", *flags, *settings]
