"""Where a training step's time goes: forward and backward pass in bfloat16, by kind of operation.

Each network is looked at channels-first, and channels-last, which trainer=auto takes where there is a C compiler.
Milliseconds are of the operations themselves, without what they call, as torch's profiler has them.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.networks import LARGE, SIZES, SMALL
from benchmarks.ours import configuration
from benchmarks.timing import Table, arguments, write_report
from src.runs import build_net

KINDS = {  # the first that an operation's name holds
    "convolutions": ("convolution", "Winograd"),
    "group norm and SiLU": ("group_norm", "GroupNorm", "silu"),
    "attention": ("attention", "Attention", "bmm", "softmax"),
    "copies and casts": ("copy_", "_to_copy", "contiguous", "clone"),
    "sums and skips": ("aten::add", "aten::cat", "aten::mul", "aten::sum", "aten::fill_", "aten::zero_"),
}
REST = "the rest"
LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    tables: list[Table] = []
    results = {}
    for size in (LARGE, SMALL):
        shape = SIZES[size]["shape"]
        net = build_net(configuration("model=unet", "model.dropout=0.0", *shaped(size)))
        found = {name: milliseconds(net, shape, args, layout) for name, layout in LAYOUTS.items()}
        results[size] = found
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        totals = {name: sum(kinds.values()) for name, kinds in found.items()}
        rows = [
            (kind, *(f"{found[name][kind]:.0f} ({found[name][kind] / totals[name]:.0%})" for name in LAYOUTS))
            for kind in (*KINDS, REST)
        ]
        rows.append(("all", *(f"{total:.0f}" for total in totals.values())))
        caption = f"milliseconds a step, {parameters:.1f}M parameters, batch {args.batch_size}, bf16"
        tables.append((caption, ("", *LAYOUTS), rows))
    write_report(args, tables, milliseconds=results)


def shaped(size: str) -> list[str]:
    channels, height, _ = SIZES[size]["shape"]
    return [f"data.channels={channels}", f"data.image_size={height}", *SIZES[size]["ours"]]


def milliseconds(net: nn.Module, shape: tuple[int, int, int], args, layout) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """A step's, by kind."""
    net.to(memory_format=layout)
    x = torch.randn(args.batch_size, *shape).contiguous(memory_format=layout)
    t = torch.rand(args.batch_size) * 999

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(net(x, t).float(), x)
        loss.backward()
        net.zero_grad()

    step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(args.steps):
            step()
    kinds: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), REST)
        kinds[kind] += event.self_cpu_time_total / 1000 / args.steps
    return kinds


if __name__ == "__main__":
    main()
