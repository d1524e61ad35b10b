"""How fast a network trains on this machine, measured on a step or two of its own."""

import time
from typing import Any

import torch
from torch import nn

from src.build import build
from src.evaluation.cost import inputs
from src.models.dropout import Dropout, give_keys

ENOUGH = 0.25  # seconds of a step that is long enough to be told
LARGEST = 500_000_000  # parameters of a network that is worth building to look at it


def pace(node: dict[str, Any], image_shape: tuple[int, int, int], batch_size: int, settings: Any) -> float | None:
    """Images a second of forward and backward passes on one device; None of networks that are too large to try.

    Images a pass grow from one until a pass takes a quarter of a second or a whole batch, so that neither time nor
    memory is that of a training.

    Args:
        node: of conf/model.
        image_shape: (C, H, W).
        settings: what conf/trainer makes; its device, precision and memory format count.
    """
    device, bf16 = torch.device(settings.device_type), settings.chosen_precision.startswith("bf16")
    with torch.random.fork_rng([]):
        net: nn.Module = build(node, "model").to(device)
    if settings.chosen_channels_last:
        net.to(memory_format=torch.channels_last)
    if sum(p.numel() for p in net.parameters()) > LARGEST:
        return None
    rows = 1
    while True:
        give_keys([m for m in net.modules() if isinstance(m, Dropout)], torch.zeros(rows, dtype=torch.int32).to(device))
        seconds = min(_seconds(net, image_shape, rows, device, bf16) for _ in range(2))
        if seconds >= ENOUGH or rows >= batch_size:
            return rows / seconds
        rows = min(2 * rows, batch_size)


def _seconds(net: nn.Module, image_shape: tuple[int, int, int], rows: int, device: torch.device, bf16: bool) -> float:
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out = net(*(v.to(device) for v in inputs(net, image_shape, rows)))
    out.float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    net.zero_grad()
    return time.perf_counter() - started
