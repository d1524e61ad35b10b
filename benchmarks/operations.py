"""The operations that are compiled for CPUs, forward and backward in bfloat16 by autocast, beside torch's own.

Each is a layer of a network by itself, with weights in float32: at the shapes of the 35.7M and of the 4.4M U-Net and of
DiT-S/2. torch's convolutions and norms are measured in both memory formats. Errors are of outputs and of all gradients,
each over its size, against float64.
"""

import time
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import arguments, interleave, spread, write_report
from src.models.attention import attend
from src.models.convolution import Conv3x3
from src.models.norm import GroupNorm

CONVOLUTIONS = [  # images, channels in and out, height
    *((16, 128, 128, 32), (16, 512, 256, 16), (16, 256, 256, 8), (16, 256, 256, 4)),
    *((16, 64, 64, 32), (16, 128, 128, 16)),
]
ATTENTIONS = [(16, 256, 1, 256), (16, 64, 1, 128), (64, 256, 6, 64)]  # images, positions, heads, channels of a head
NORMS = [(16, 128, 32), (16, 256, 16)]  # images, channels, height
SECONDS = 0.05  # of a turn, at the least
OURS, FIRST, LAST = "ours", "torch", "torch, channels-last"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    rows, results = [], {}
    for name, layers, x in cases():
        few = x[:2]
        exact = gradients(deepcopy(layers[FIRST]).double(), few.double())
        errors = [error(gradients(layers[key], laid(few, key)), exact) for key in (OURS, FIRST)]
        rounds = interleave({key: turn(layer, laid(x, key)) for key, layer in layers.items()}, OURS, args.rounds)
        theirs = [spread(rounds.ratios(key, OURS)) if key in layers else "" for key in (FIRST, LAST)]
        ratios = [*theirs, spread(rounds.control_ratios())]
        rows.append([name, f"{rounds.median(OURS):.2f}", *ratios, *(f"{e:.2%}" for e in errors)])
        results[name] = {"milliseconds": rounds.values, "errors": errors}
    caption = f"forward and backward pass, {torch.get_num_threads()} threads, {args.rounds} rounds"
    header = ["", "ours, ms", f"{FIRST} / ours", f"{LAST} / ours", "ours again / ours", "error", "torch's"]
    write_report(args, [(caption, header, rows)], results=results)


def cases() -> list[tuple[str, dict[str, nn.Module], Tensor]]:
    """Names, layers that compute the same, and what they take."""
    torch.manual_seed(0)
    found: list[tuple[str, dict[str, nn.Module], Tensor]] = []
    for B, C, D, H in CONVOLUTIONS:
        layers = both(Conv3x3(C, D), nn.Conv2d(C, D, 3, padding=1))
        found.append((f"convolution, {B}x{C}x{H}x{H} to {D}", layers, torch.randn(B, C, H, H)))
    for B, N, heads, d in ATTENTIONS:
        layers = {OURS: Attend(), FIRST: TorchsAttend()}
        found.append((f"attention, {B}x{N}, {heads} of {d}", layers, torch.randn(B, N, 3, heads, d)))
    for B, C, H in NORMS:
        layers = both(GroupNorm(32, C), nn.GroupNorm(32, C))
        found.append((f"group norm, {B}x{C}x{H}x{H}", layers, torch.randn(B, C, H, H)))
    return found


def both(ours: nn.Module, theirs: nn.Module) -> dict[str, nn.Module]:
    """With the same weights, in their memory formats."""
    ours.load_state_dict(theirs.state_dict())
    last = deepcopy(theirs).to(memory_format=torch.channels_last)
    return {OURS: ours.to(memory_format=torch.channels_last), FIRST: theirs, LAST: last}


class Attend(nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        return attend(qkv)


class TorchsAttend(nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def laid(x: Tensor, key: str) -> Tensor:
    """As the contender's layer before it would leave it."""
    x = x.bfloat16()
    return x if key == FIRST or x.ndim != 4 else x.contiguous(memory_format=torch.channels_last)


def gradients(layer: nn.Module, x: Tensor) -> Tensor:
    """Outputs and gradients, in a row; of a loss whose gradient is in the type of the outputs."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x)
    g = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).bfloat16()
    found = torch.autograd.grad(y, [x, *layer.parameters()], g.to(y.dtype))
    return torch.cat([v.double().flatten() / v.double().norm() for v in (y.detach(), *found)])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def turn(layer: nn.Module, x: Tensor) -> Callable[[], float]:
    """Milliseconds of a step, over as many as fill a turn."""
    x.requires_grad_()

    def steps(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            y.backward(y.detach())
            x.grad = None
            layer.zero_grad()
        return (time.perf_counter() - started) / count

    steps(2)
    count = max(1, round(SECONDS / steps(3)))
    return lambda: 1000 * steps(count)


if __name__ == "__main__":
    main()
