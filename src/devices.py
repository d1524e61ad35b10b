"""GPUs for jobs that run side by side on one machine: each its own, as long as there are enough."""

import fcntl
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

_held: list[int] = []  # the open lock of this process, which the kernel takes back when it ends, however it ends


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Asks without CUDA, which reads that variable once a process.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA reads it
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"UUID: (MIG-[^)]+)", listed) or re.findall(r"UUID: ([^)]+)", listed)


def claim_gpu() -> None:
    """Leaves this process one GPU, the least used by others that have called this, until it ends.

    To be called before CUDA is initialised. Without a GPU, or once a GPU is claimed, it does nothing.
    """
    names = gpus()
    if _held or not names:
        return
    folder = Path(tempfile.gettempdir(), f"diffusion-lab-devices-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for sharers in itertools.count():  # first those that nobody has, then those that one has, ...
        for name in names:
            file = os.open(folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', name)}.{sharers}.lock", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                continue
            _held.append(file)
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return
