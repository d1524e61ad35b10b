"""Looks at a schedule before any training: python -m src.preview [schedule=...] [data=...] [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cli import command


@dataclass
class PreviewConfig:
    """The keys at the root of conf/preview.yaml."""

    schedule: dict
    objective: dict
    weighting: dict
    density: dict
    data: dict
    out: str
    seed: int
    num_images: int


def preview(config: dict[str, Any], out: Path) -> None:
    """Writes preview.png and preview.json into `out`, and prints what looks wrong."""
    from src.evaluation.preview import look

    look(config, out)


def inherit(run: dict[str, Any], overrides: list[str]) -> list[str]:
    """Nothing: a preview is of no run."""
    return []


main = command("preview", PreviewConfig, preview, inherit)

if __name__ == "__main__":
    main()
