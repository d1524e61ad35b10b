"""When a network is compiled, and when what is compiled is left alone."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._triton import has_triton

from src.models.kernel import c_compiler

ENOUGH_STEPS = 10_000  # that pay for the minute or two in which the kernels of a GPU are compiled


def worth_compiling(device_type: str, max_steps: int) -> bool:
    """Whether a run is sooner at its end when its network is compiled, which needs Triton and a C compiler."""
    return device_type == "cuda" and max_steps >= ENOUGH_STEPS and has_triton() and c_compiler() is not None


def not_compiled() -> AbstractContextManager[Any]:
    """Compiled networks compute inside as those that are not: what is asked now and then is not worth a compilation."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
