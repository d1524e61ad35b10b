"""Looks at a schedule before any training: python -m src.preview [schedule=...] [data=...] [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cli import command
from src.train import TrainConfig


@dataclass
class PreviewConfig(TrainConfig):
    """The keys at the root of conf/preview.yaml: those of a training, and a few more."""

    out: str
    num_images: int


def preview(config: dict[str, Any], out: Path) -> None:
    """Writes preview.png, preview.json and data.png into `out`, and prints what looks wrong."""
    from src.evaluation.preview import look

    look(config, out)


def inherit(run: dict[str, Any], overrides: list[str]) -> list[str]:
    """What the run was started with."""
    return list(run["overrides"])


main = command("preview", PreviewConfig, preview, inherit)

if __name__ == "__main__":
    main()
