"""How the benchmarks measure and report.

Contenders take turns in interleaved rounds, each round starting one further along, so that what drifts (clock speed,
a neighbour's load) meets all of them alike. One round of warm-up is thrown away. What is reported is the median over
rounds of ratios and differences within a round. One contender is entered twice: the spread of that ratio is what the
machine's noise alone can do, and a difference inside it means nothing.
"""

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from src.files import replacing

PACKAGES = (
    *("torch", "torchvision", "lightning", "diffusers", "accelerate", "denoising-diffusion-pytorch"),
    *("numpy", "pillow", "scikit-learn"),
)
AGAIN = " again"


@dataclass(frozen=True)
class Rounds:
    """What was measured: values[contender][round]."""

    values: Mapping[str, Sequence[float]]
    control: str

    def median(self, name: str) -> float:
        return median(self.values[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """One ratio a round."""
        return [a / b for a, b in zip(self.values[name], self.values[to], strict=True)]

    def differences(self, name: str, to: str) -> list[float]:
        """One difference a round."""
        return [a - b for a, b in zip(self.values[name], self.values[to], strict=True)]

    def control_ratios(self) -> list[float]:
        """The contender that was entered twice, against itself."""
        return self.ratios(self.control + AGAIN, self.control)


def interleave(contenders: Mapping[str, Callable[[], float]], control: str, rounds: int) -> Rounds:
    """Measures the contenders, and `control` a second time, in `rounds` rounds after one of warm-up.

    Args:
        contenders: each call returns one measurement, of which it has excluded its own preparations.
        control: the contender to be entered twice.
    """
    entries = {**contenders, control + AGAIN: contenders[control]}
    names = list(entries)
    values: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(rounds + 1) * len(names), unit="turn", dynamic_ncols=True) as bar:
        for r in range(rounds + 1):
            first = r % len(names)
            for name in names[first:] + names[:first]:
                bar.set_description(f"round {r} of {rounds}: {name}" if r else f"warm-up: {name}")
                gc.collect()  # one contender's rubbish is not another's time
                value = entries[name]()
                if r:
                    values[name].append(value)
                bar.update()
    return Rounds(values, control)


def spread(values: Sequence[float]) -> str:
    """Median and extremes."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints text cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in [header, ["-" * width for width in widths], *rows]:
        first, *others = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        print("  ".join([first, *others]).rstrip())
    print(flush=True)


def arguments(module_doc: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks share."""
    parser = argparse.ArgumentParser(description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results, versions and date to FILE")
    return parser


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """When, where and with which versions a result came about."""
    device = torch.device(device)
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    cpu += f", {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m", _main_module(), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {cpu}",
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := _version(p))}},
    }


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # a caption, the head of its columns, and rows


def rates(caption: str, rounds: Rounds, comparisons: Mapping[str, Sequence[float]]) -> list[Table]:
    """Tables of images a second, and of ratios of them within rounds."""
    return [
        (caption, ("", "images/s"), [(name, f"{rounds.median(name):,.0f}") for name in rounds.values]),
        (
            f"ratios of images/s in {len(rounds.values[rounds.control])} rounds",
            ("", "median (least to most)"),
            [(name, spread(ratios)) for name, ratios in comparisons.items()],
        ),
    ]


def write_report(
    args: argparse.Namespace, tables: Sequence[Table], device: torch.device | str = "cpu", **results: Any
) -> None:
    """Prints the tables; writes them with all results, settings and environment to args.json, where that was given."""
    for caption, header, rows in tables:
        print(f"\n{caption}\n")
        print_table(header, rows)
    if args.json is None:
        return
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    content = {**environment(device), "settings": settings, "tables": tables, **results}
    with replacing(args.json) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
    print(f"written: {args.json}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _main_module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
