"""Draws samples from a trained model: python -m src.sample run=<run folder or .ckpt> [sampler=...] [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.cli import command
from src.overrides import plain_value, same_job


@dataclass
class SampleConfig:
    """The keys at the root of conf/sample.yaml."""

    run: str
    out: str
    sampler: dict
    guidance: dict
    labels: str | list[int] | None
    num_samples: int | None
    batch_size: int
    seed: int
    weights: str
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["32-true", "bf16-mixed"]
    trajectory: bool
    devices: int | Literal["auto"]


def sample(config: dict[str, Any], out: Path) -> None:
    """Writes grid.png and samples.npz, and with trajectory=true a strip and an animation, into `out`."""
    from src.evaluation.sampling import draw
    from src.processes import on_devices

    on_devices(
        lambda group: draw(config, out, group), lambda: same_job("sample", out), config["devices"], config["device"]
    )


def inherit(run: dict[str, Any], overrides: list[str]) -> list[str]:
    """Where no sampler is asked for, the run's own."""
    if any(override.startswith("sampler=") for override in overrides) or not run.get("sampler"):
        return []
    settings = [f"sampler.{k}={plain_value(v)}" for k, v in run["sampler"].items() if k != "_target_"]
    return [f"sampler={run['choices']['sampler']}", *settings]


main = command("sample", SampleConfig, sample, inherit)

if __name__ == "__main__":
    main()
