"""summary.json: what a reader wants to know of a finished run."""

import json
import math
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import nn

from src.files import replacing

PACKAGES = ("torch", "lightning", "hydra-core", "torchvision", "torchmetrics", "wandb")


def summarize(
    trainer: Trainer,
    net: nn.Module,
    flops: int,
    config: dict[str, Any],
    precision: str,
    train_loss: float,
    images_seen: int,
    images_per_second: float,
    wall_seconds: float,
) -> dict[str, Any]:
    """The summary as plain values; times in seconds, memory in bytes.

    Args:
        flops: see `flops_per_image`.
    """
    device = trainer.strategy.root_device
    return {
        "name": config["name"],
        "metrics": {"train/loss": train_loss, **{k: float(v) for k, v in trainer.callback_metrics.items()}},
        "steps": trainer.global_step,
        "images_seen": images_seen,
        "images_per_second": images_per_second,
        "wall_seconds": wall_seconds,
        "parameters": sum(p.numel() for p in net.parameters()),
        "flops_per_image": flops,
        "peak_memory_bytes": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {_processor()}",
        "world_size": trainer.world_size,
        "precision": precision,
        "seed": config["seed"],
        "git_commit": git_commit(),
        "versions": versions(),
    }


def write(summary: dict[str, Any], path: Path) -> None:
    """Writes the summary as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")


def _finite(node: Any) -> Any:
    """With null for what JSON has no word for: the loss of a run that ended before its first row."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node


def versions() -> dict[str, str]:
    """Of Python and of the packages that results may depend on; what is not there, such as wandb, is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@torch.no_grad()
def flops_per_image(net: nn.Module, image_shape: tuple[int, int, int], device: torch.device) -> int:
    """Floating-point operations of one forward pass for one image, a multiply-add counted as two."""
    from torch.utils.flop_counter import FlopCounterMode

    training = net.training
    net.eval()
    dtype = next(net.parameters()).dtype
    with FlopCounterMode(display=False) as counter:
        channels = image_shape[0] * (1 + getattr(net, "self_conditioning", False))
        x = torch.zeros(1, channels, *image_shape[1:], device=device, dtype=dtype)
        call = (
            net.forward if getattr(net, "_compiled_call_impl", None) else net
        )  # by which sharded weights are gathered
        call(x, *(() if getattr(net, "classifies", False) else (torch.zeros(1, device=device),)))
    net.train(training)
    return int(counter.get_total_flops())


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU; resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git_commit() -> str | None:
    """The commit of this code, with "+dirty" when files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
