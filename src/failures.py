"""Why a job of a sweep failed that leaves no folder of its own to say so: <sweep folder>/failed/<job number>.json."""

import contextlib
import json
from pathlib import Path

from src.errors import UserError, reason
from src.launch import rank
from src.runs import CONFIG

FAILED = "failed"


def sentence(error: BaseException) -> str:
    """What is said of an error in one line."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {' '.join(reason(error).split())}"


def note_failure(folder: Path, error: Exception) -> None:
    """Notes, for the job that Hydra runs now, its overrides and why it failed, unless `folder` holds its run."""
    from hydra.core.hydra_config import HydraConfig

    if rank() != 0 or (folder / CONFIG).is_file():
        return
    path = _note()
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        content = {"overrides": list(HydraConfig.get().overrides.task), "error": sentence(error)}
        path.write_text(json.dumps(content, indent=2) + "\n")


def forget_failure() -> None:
    """Takes away what was noted when the job of this number failed before."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            _note().unlink(missing_ok=True)
            _note().parent.rmdir()  # unless it holds others


def _note() -> Path:
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir, FAILED, f"{hydra.job.num}.json")
