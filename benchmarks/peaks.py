"""What the machine itself can do: the most operations a second of a convolution and of a matrix product."""

import time

import torch
import torch.nn.functional as F

REPEATS = 7
# Images, channels in and out, height and width; and sides of square matrices.
CONVOLUTIONS = {
    "cpu": ((16, 128, 32), (16, 256, 16), (64, 128, 14)),
    "cuda": ((1024, 128, 32), (512, 256, 32), (512, 512, 16)),
}
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


def peaks(device: torch.device) -> dict[str, float]:
    """Operations a second, a multiply-add as two: "convolution, bf16" and so on; the best of sizes and layouts.

    Convolutions are 3x3, forwards, with the best algorithm that cuDNN finds on a GPU; float32 there is TF32.
    """
    if device.type == "cpu":
        return _peaks(device)
    products, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    cudnn.benchmark, cudnn.allow_tf32 = True, True
    try:
        return _peaks(device)
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.benchmark, cudnn.allow_tf32 = before
        torch.cuda.empty_cache()


def _peaks(device: torch.device) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates = []
        for B, C, S in CONVOLUTIONS[device.type]:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(B, C, S, S, dtype=dtype, device=device).contiguous(memory_format=layout)
                weight = torch.randn(C, C, 3, 3, dtype=dtype, device=device).contiguous(memory_format=layout)
                rates.append(2 * B * C * C * 9 * S * S / _seconds(F.conv2d, x, weight, None, 1, 1))
        found[f"convolution, {name}"] = max(rates)
        sides = {side: torch.randn(side, side, dtype=dtype, device=device) for side in SIDES[device.type]}
        found[f"matrix product, {name}"] = max(2 * side**3 / _seconds(torch.mm, a, a) for side, a in sides.items())
    return found


@torch.no_grad()
def _seconds(function, *inputs) -> float:  # type: ignore[no-untyped-def]
    """The least of some."""
    function(*inputs)
    times = []
    for _ in range(REPEATS):
        _wait(inputs[0])
        started = time.perf_counter()
        function(*inputs)
        _wait(inputs[0])
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
