"""The C of this folder, compiled for this machine's CPU when it is first wanted and kept for later."""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.files import cache_folder, replacing
from src.models.patches import is_channels_last

WITHOUT_PRODUCTS = ("-DNO_PRODUCTS",)
PRODUCTS = ("convolution.c", "attention.c", "products.h")  # of bfloat16, for CPUs that have them
SOURCES = [Path(__file__).with_name(name) for name in ("group_norm.c", "dropout.c", *PRODUCTS, "half.h")]
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
WIDE = ("-mprefer-vector-width=512",)  # of x86
SECONDS = 120  # that a compiler may take; it takes four
STEP = 32  # channels that products of bfloat16 take at a time: COLS of products.h
KEPT = [int(bit) for bit in "01101110011010000100010111000001"]  # of the key 1, at p = 1/2
DTYPES = (torch.float32, torch.bfloat16)
_one_at_a_time = threading.Lock()  # compiles


def c_compiler() -> str | None:
    """$CC, cc, gcc or clang, where there is one."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no C compiler, or what it makes is wrong.

    Without products of bfloat16 where the CPU or the compiler has none, or the CPU has better ones (AMX, which oneDNN
    knows).
    """
    compiler = c_compiler()
    if compiler is None or platform.system() != "Linux":
        return None
    attempts = [WITHOUT_PRODUCTS] if "amx_bf16" in _cpu().split() else [(), WITHOUT_PRODUCTS]
    with _one_at_a_time, torch.device("cpu"):
        made = (_made(compiler, attempt) for attempt in attempts)
        return next((functions for functions in made if functions is not None), None)


def _made(compiler: str, defined: tuple[str, ...]) -> ctypes.CDLL | None:
    """The functions, if they can be compiled and are right."""
    flags = (*FLAGS, *(WIDE if platform.machine() == "x86_64" else ()), *defined)
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
    if functions.products_known():
        for filters in (functions.winograd_filters, functions.winograd_turned_filters):
            filters.argtypes, filters.restype = [*[pointer] * 2, *[long] * 2, flag], None
        functions.winograd.argtypes = functions.winograd_gradient.argtypes = [*[pointer] * 4, *[long] * 5, flag]
        functions.attention.argtypes = [*[pointer] * 3, *[long] * 4, flag]
        functions.attention_gradient.argtypes = [*[pointer] * 4, *[long] * 4, flag]
    return functions if _right(functions) else None


def run(name: str, tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
    """Calls a function of the library with where the tensors lie, with the numbers and with torch's threads.

    Raises:
        MemoryError: there was none for what lies between.
    """
    functions = library()
    assert functions is not None
    pointers = [None if v is None else v.data_ptr() for v in tensors]
    if getattr(functions, name)(*pointers, *numbers, torch.get_num_threads()):
        raise MemoryError(f"no memory for the {name} of {tuple(tensors[0].shape)}")  # type: ignore[union-attr]


def multiplies_bfloat16() -> bool:
    """Whether products.h knows how this CPU multiplies bfloat16 and adds up in float."""
    functions = library()
    return functions is not None and bool(functions.products_known())


def can_take(x: Tensor) -> bool:
    """Whether `group_norm` takes (B, C, H, W): what lies channels-last, and is what the C knows."""
    return known(x) and is_channels_last(x) and library() is not None


def can_drop(x: Tensor, keys: Tensor) -> bool:
    """Whether `dropout` takes (B, ...): what lies row by row, channels-last or not, and is what the C knows."""
    dense = x.is_contiguous() or (x.ndim == 4 and is_channels_last(x))
    keyed = keys.device == x.device and keys.dtype == torch.int32 and keys.shape == x.shape[:1]
    return known(x) and dense and keyed and library() is not None


def known(x: Tensor) -> bool:
    """Plain tensors on a CPU, not those that only have a shape, and nobody who looks for torch's own operations."""
    return x.device.type == "cpu" and type(x) is Tensor and x.dtype in DTYPES and not _watched()


def _watched() -> bool:
    """By a compiler, by what counts or records operations, or by transformations of functions."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return traced or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def in_bfloat16(*tensors: Tensor) -> bool:
    """Whether torch would compute of these in that type: by autocast, or as all are of it."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and all(v.dtype in DTYPES for v in tensors)
    return all(v.dtype == torch.bfloat16 for v in tensors)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """F.group_norm of what `can_take` takes, with or without SiLU after it, channels-last; its gradient has none."""
    return _GroupNorm.apply(x, groups, weight, bias, eps, silu)


class _GroupNorm(torch.autograd.Function):
    """Keeps the input and two numbers a group, not the normalised images."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu):  # type: ignore[no-untyped-def]
        y = torch.empty_like(x)
        stats = x.new_empty((2, x.shape[0], groups), dtype=torch.float32)
        w, b = plain(weight), plain(bias)
        run("group_norm_forward", (x, y, w, b, *stats), *_sizes(x), groups, eps, *_flags(x, silu))
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, bias, stats = ctx.saved_tensors
        x = x.contiguous(memory_format=torch.channels_last)  # which those who save tensors may not keep
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        sums = x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)
        tensors = (x, dy, dx, plain(weight), plain(bias), *stats, *sums)
        run("group_norm_backward", tensors, *_sizes(x), ctx.groups, *_flags(x, ctx.silu))
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
    run("dropout", (x, y, keys.contiguous()), len(x), x[0].numel(), lowest, scale, x.dtype == torch.bfloat16)
    return y


def _sizes(x: Tensor) -> tuple[int, int, int]:
    B, C, H, W = x.shape
    return B, H * W, C


def _flags(x: Tensor, silu: bool) -> tuple[bool, bool]:
    return x.dtype == torch.bfloat16, silu


def plain(v: Tensor) -> Tensor:
    """In float32, one number after the other."""
    return v.detach().float().contiguous()


def _cpu() -> str:
    """What this CPU can do: a folder of caches may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _right(functions: ctypes.CDLL) -> bool:
    """Whether what the compiler made says what is known of some small images."""
    multiplies = not functions.products_known() or (_convolves(functions) and _attends(functions))
    return multiplies and _normalises(functions) and _drops(functions)


def _normalises(functions: ctypes.CDLL) -> bool:
    x = torch.arange(24, dtype=torch.float32)
    y, ones, zeros, stats = torch.full_like(x, torch.nan), *(x.new_full((4,), v) for v in (1, 0)), x.new_empty((2, 2))
    tensors = (x, y, ones, zeros, *stats)
    functions.group_norm_forward(*(v.data_ptr() for v in tensors), 1, 6, 4, 2, 1e-6, 0, 0, 1)
    known = torch.nn.functional.group_norm(x.view(1, 6, 4).transpose(1, 2), 2, eps=1e-6).transpose(1, 2).flatten()
    return torch.allclose(y, known, rtol=1e-5, atol=1e-5)


def _drops(functions: ctypes.CDLL) -> bool:
    key = torch.ones(1, dtype=torch.int32)
    ones = torch.ones(32, dtype=torch.float32)
    kept = torch.zeros_like(ones)
    functions.dropout(*(v.data_ptr() for v in (ones, kept, key)), 1, 32, 0, 2.0, 0, 1)
    return kept.tolist() == [2.0 * bit for bit in KEPT]


def _convolves(functions: ctypes.CDLL) -> bool:
    """Of small whole numbers, whose sums bfloat16 holds exactly; a quarter of the filter's is whole, too."""
    x, dy = ((torch.arange(3 * 4 * 32) % m - m // 2).bfloat16().view(1, 3, 4, 32) for m in (5, 3))
    w = 4 * (torch.arange(32 * 9 * 32) % 7 % 3 - 1).float().view(32, 3, 3, 32)
    filters, dw = x.new_empty(16 * 32 * 32), torch.full_like(w, torch.nan)
    y, dx, db = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan), torch.full_like(w[0, 0, 0], torch.nan)

    def call(name: str, *arguments: Tensor | int | None) -> None:
        getattr(functions, name)(*(v.data_ptr() if isinstance(v, Tensor) else v for v in arguments), 1)

    call("winograd_filters", w, filters, 32, 32)
    call("winograd", x, filters, None, y, 1, 3, 4, 32, 32)
    call("winograd_turned_filters", w, filters, 32, 32)
    call("winograd", dy, filters, None, dx, 1, 3, 4, 32, 32)
    call("winograd_gradient", x, dy, dw, db, 1, 3, 4, 32, 32)
    images, weight, gradient = (v.float().permute(0, 3, 1, 2) for v in (x, w, dy))
    known = [torch.nn.functional.conv2d(images, weight, padding=1)]
    known += torch.ops.aten.convolution_backward(
        gradient, images, weight, [32], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
    )
    found = [v.permute(0, 3, 1, 2) for v in (y, dx, dw)] + [db]
    return all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, known, strict=True))


def _attends(functions: ctypes.CDLL) -> bool:
    """To equal keys equally, to the mean of the values 0, 1, 2; and the gradient of the sum of that."""
    qkv = torch.ones((3, 3, 32), dtype=torch.bfloat16)  # (N, 3, d)
    qkv[:, 2] = torch.arange(3)[:, None]
    out, dqkv = torch.full((3, 32), torch.nan, dtype=torch.bfloat16), torch.full_like(qkv, torch.nan)
    stats, ones = torch.full((3, 2), torch.nan, dtype=torch.float32), torch.ones_like(out)
    functions.attention(*(v.data_ptr() for v in (qkv, out, stats)), 1, 3, 1, 32, 1)
    functions.attention_gradient(*(v.data_ptr() for v in (qkv, stats, ones, dqkv)), 1, 3, 1, 32, 1)
    known = torch.zeros_like(qkv)  # of a query: no key says more
    known[:, 1] = torch.tensor([-1.0, 0.0, 1.0])[:, None] * math.sqrt(32)
    known[:, 2] = 1
    return bool((out == 1).all()) and torch.allclose(dqkv.float(), known.float(), rtol=0.01, atol=0.01)
