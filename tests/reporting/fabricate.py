"""Run folders that no training wrote, with numbers that a test knows."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from tests.test_configs import configuration


@cache
def _smoke() -> dict[str, Any]:
    return configuration("experiment=smoke")


def config(*overrides: str, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """That of experiment=smoke, with values by dotted keys, such as config(**{"schedule.beta_end": 0.01})."""
    made = copy.deepcopy(_smoke())
    made["choices"] = {k: v for k, v in made["choices"].items() if not k.startswith("hydra/")}
    changes = {"seed": seed, "data.seed": seed, **settings}
    for key, value in changes.items():
        *parents, name = key.split(".")
        node = made
        for parent in parents:
            node = node[parent]
        node[name] = value
    asked = [f"{key}={value}" for key, value in settings.items() if not key.startswith("choices.")]
    made["overrides"] = ["experiment=smoke", *asked, f"seed={seed}", *overrides]
    return made


def run(folder: Path, seed: int = 0, loss: float = 0.5, finished: bool = True, **settings: Any) -> Path:
    """A run of 20 steps that has a row every 5, grids at 10 and 20, and, if it is finished, a summary.

    train/loss is loss + 1 / step, val/loss_ema at steps 10 and 20 is loss + 1 / step too; wall time is step seconds.
    """
    folder.mkdir(parents=True)
    made = config(seed=seed, **settings)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(made))
    lines = ["step,train/loss,images,images_per_second,system/wall_seconds,train/loss_by_level/00,val/loss_ema"]
    for step in (5, 10, 15, 20):
        value = loss + 1 / step
        held_out = repr(value) if step % 10 == 0 else ""
        lines.append(f"{step},{value!r},{32.0 * step!r},32.0,{float(step)!r},{loss!r},{held_out}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    for step in (10, 20):
        grid(folder / "samples" / f"step={step}.png", shade=10 * step + seed)
    if finished:
        summary(folder, seed, loss + 1 / 20)
    return folder


def summary(folder: Path, seed: int, loss: float, **further: Any) -> None:
    content = {
        "metrics": {"train/loss": loss, "val/loss_ema": loss, "val/loss_raw": loss + 1},
        **{"steps": 20, "images_seen": 640, "images_per_second": 32.0, "wall_seconds": 20.0},
        **{"parameters": 176_849, "flops_per_image": 1_000_000, "peak_memory_bytes": 2_000_000_000},
        **{"device": "cpu: test", "world_size": 1, "precision": "32-true", "seed": seed, "git_commit": "a" * 40},
        **{"versions": {"torch": "2.15.0"}, **further},
    }
    (folder / "summary.json").write_text(json.dumps(content))


def grid(path: Path, shade: int, size: int = 8, columns: int = 4) -> None:
    """A grid of 16 images of one shade, enlarged 8 times as training does it."""
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((columns * (size + 1) + 1,) * 2, 255, np.uint8)
    for i in range(columns**2):
        top, left = (i // columns) * (size + 1) + 1, (i % columns) * (size + 1) + 1
        pixels[top : top + size, left : left + size] = shade
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(path)


PROTOCOL = {"num_samples": 1000, "steps": 50, "weights": "ema", "seed": 0, "reference": {"sha256": "ab" * 32}}


def evaluation(run: Path, name: str, scores: dict[str, float | None], **changes: Any) -> Path:
    """<run>/evaluation/<name>/metrics.json; changes of the protocol, and of the stamp as stamp={...}."""
    stamp = {
        **{"run": str(run), "checkpoint": str(run / "checkpoints" / "last.ckpt"), "checkpoint_sha256": "c" * 64},
        **{"device": "cpu", "git_commit": "a" * 40, "versions": {"torch": "2.15.0"}},
        **changes.pop("stamp", {}),
    }
    error = changes.pop("standard_error", None)
    content: dict[str, Any] = {
        score: {
            **{"value": value, "standard_error": error, "seconds": 1.0, "protocol": {**PROTOCOL, **changes}},
            "better": "higher" if score.startswith("precision") else "lower",
        }
        for score, value in scores.items()
    }
    path = run / "evaluation" / name / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**content, "stamp": stamp}))
    return path
