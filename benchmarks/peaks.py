"""What the machine itself can do: the most operations a second of a convolution and of a matrix product."""

import time

import torch
import torch.nn.functional as F

REPEATS = 7
CONVOLUTIONS = ((16, 128, 32), (16, 256, 16), (64, 128, 14))  # images, channels in and out, height and width
SIDES = (1024, 2048)  # of square matrices


def peaks() -> dict[str, float]:
    """Operations a second, a multiply-add as two: "convolution, bf16" and so on; the best of sizes and layouts.

    Convolutions are 3x3, forwards.
    """
    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates = []
        for B, C, S in CONVOLUTIONS:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(B, C, S, S, dtype=dtype).contiguous(memory_format=layout)
                weight = torch.randn(C, C, 3, 3, dtype=dtype).contiguous(memory_format=layout)
                rates.append(2 * B * C * C * 9 * S * S / _seconds(F.conv2d, x, weight, None, 1, 1))
        found[f"convolution, {name}"] = max(rates)
        sides = {side: torch.randn(side, side, dtype=dtype) for side in SIDES}
        found[f"matrix product, {name}"] = max(2 * side**3 / _seconds(torch.mm, a, a) for side, a in sides.items())
    return found


@torch.no_grad()
def _seconds(function, *inputs) -> float:  # type: ignore[no-untyped-def]
    """The least of some."""
    function(*inputs)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function(*inputs)
        times.append(time.perf_counter() - started)
    return min(times)
