"""The C of group_norm.c and dropout.c, compiled for this machine's CPU when it is first wanted and kept for later."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.files import cache_folder, replacing
from src.models.patches import is_channels_last

SOURCES = [Path(__file__).with_name(name) for name in ("group_norm.c", "dropout.c", "half.h")]
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
WIDE = ("-mprefer-vector-width=512",)  # of x86
SECONDS = 120  # that a compiler may take; it takes two
KEPT = [int(bit) for bit in "01101110011010000100010111000001"]  # of the key 1, at p = 1/2
DTYPES = (torch.float32, torch.bfloat16)


def c_compiler() -> str | None:
    """$CC, cc, gcc or clang, where there is one."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no C compiler, or what it makes is wrong."""
    compiler = c_compiler()
    if compiler is None or platform.system() != "Linux":
        return None
    flags = (*FLAGS, *(WIDE if platform.machine() == "x86_64" else ()))
    text = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(text + " ".join((compiler, *flags, _cpu())).encode()).hexdigest()[:16]
    path = cache_folder("kernels") / f"models-{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                sources = [str(source) for source in SOURCES if source.suffix == ".c"]
                command = [compiler, *flags, *sources, "-o", str(temporary), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        functions = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    pointer, long, real, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
    functions.group_norm_forward.argtypes = [*[pointer] * 6, *[long] * 4, real, *[flag] * 3]
    functions.group_norm_backward.argtypes = [*[pointer] * 9, *[long] * 4, *[flag] * 3]
    functions.dropout.argtypes = [*[pointer] * 3, *[long] * 2, flag, real, *[flag] * 2]
    functions.dropout.restype = None
    return functions if _right(functions) else None


def can_take(x: Tensor) -> bool:
    """Whether `group_norm` takes (B, C, H, W): what lies channels-last, and is what the C knows."""
    return _known(x) and is_channels_last(x) and library() is not None


def can_drop(x: Tensor, keys: Tensor) -> bool:
    """Whether `dropout` takes (B, ...): what lies row by row, channels-last or not, and is what the C knows."""
    dense = x.is_contiguous() or (x.ndim == 4 and is_channels_last(x))
    keyed = keys.device == x.device and keys.dtype == torch.int32 and keys.shape == x.shape[:1]
    return _known(x) and dense and keyed and library() is not None


def _known(x: Tensor) -> bool:
    """Plain tensors on a CPU, and not those that only have a shape."""
    return x.device.type == "cpu" and type(x) is Tensor and x.dtype in DTYPES and not torch.compiler.is_compiling()


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """F.group_norm of what `can_take` takes, with or without SiLU after it, channels-last; its gradient has none."""
    return _GroupNorm.apply(x, groups, weight, bias, eps, silu)


class _GroupNorm(torch.autograd.Function):
    """Keeps the input and two numbers a group, not the normalised images."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu):  # type: ignore[no-untyped-def]
        y = torch.empty_like(x)
        stats = x.new_empty((2, x.shape[0], groups), dtype=torch.float32)
        w, b = _plain(weight), _plain(bias)
        _call("forward", (x, y, w, b, *stats), x, (groups, eps), silu)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, bias, stats = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        sums = x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)
        _call("backward", (x, dy, dx, _plain(weight), _plain(bias), *stats, *sums), x, (ctx.groups,), ctx.silu)
        dweight, dbias = sums.sum(1)
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


def dropout(x: Tensor, keys: Tensor, lowest: int, scale: float) -> Tensor:
    """What `can_drop` takes, in its memory format.

    Args:
        keys: (B,) int32, one a row.
        lowest: the least 16 bits, as a signed number, of what is kept; see `src.models.dropout`.
        scale: what is kept is multiplied by it, rounded to the type of x.
    """
    return _Dropout.apply(x, keys, lowest, scale)


class _Dropout(torch.autograd.Function):
    """Keeps the keys, and not the mask, which is as large as the images."""

    @staticmethod
    def forward(ctx, x, keys, lowest, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(keys)
        ctx.numbers, ctx.dtype, ctx.channels_last = (lowest, scale), x.dtype, not x.is_contiguous()
        return _dropped(x, keys, lowest, scale)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (keys,) = ctx.saved_tensors
        memory_format = torch.channels_last if ctx.channels_last else torch.contiguous_format
        dy = dy.to(ctx.dtype).contiguous(memory_format=memory_format)
        return _Dropout.apply(dy, keys, *ctx.numbers), None, None, None


def _dropped(x: Tensor, keys: Tensor, lowest: int, scale: float) -> Tensor:
    y = torch.empty_like(x)
    scale = float(torch.tensor(scale).to(x.dtype))
    tensors, sizes = (x, y, keys.contiguous()), (len(x), x[0].numel())
    half, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    _library().dropout(*(t.data_ptr() for t in tensors), *sizes, lowest, scale, half, threads)
    return y


def _library() -> ctypes.CDLL:
    functions = library()
    assert functions is not None
    return functions


def _call(name: str, tensors: tuple[Tensor, ...], x: Tensor, numbers: tuple[float, ...], silu: bool) -> None:
    B, C, H, W = x.shape
    function = getattr(_library(), f"group_norm_{name}")
    flags = x.dtype == torch.bfloat16, silu, torch.get_num_threads()
    if function(*(t.data_ptr() for t in tensors), B, H * W, C, *numbers, *flags):
        raise MemoryError(f"no memory for the group norm of {tuple(x.shape)}")


def _plain(v: Tensor) -> Tensor:
    return v.detach().float().contiguous()


def _cpu() -> str:
    """What this CPU can do: a folder of caches may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _right(functions: ctypes.CDLL) -> bool:
    """Whether what the compiler made normalises a small image, and drops of 32 elements those that are known."""
    x = torch.arange(24, dtype=torch.float32)
    y, ones, zeros, stats = torch.empty(24), torch.ones(4), torch.zeros(4), torch.empty(2, 2)
    tensors = (x, y, ones, zeros, *stats)
    functions.group_norm_forward(*(t.data_ptr() for t in tensors), 1, 6, 4, 2, 1e-6, 0, 0, 1)
    known = torch.nn.functional.group_norm(x.view(1, 6, 4).transpose(1, 2), 2, eps=1e-6).transpose(1, 2).flatten()
    ones, kept, key = torch.ones(32), torch.empty(32), torch.ones(1, dtype=torch.int32)
    functions.dropout(*(t.data_ptr() for t in (ones, kept, key)), 1, 32, 0, 2.0, 0, 1)
    return bool(torch.allclose(y, known, rtol=1e-5, atol=1e-5)) and kept.tolist() == [2.0 * bit for bit in KEPT]
