"""Edits images with a trained model: python -m src.edit run=<run folder or .ckpt> verb=<verb> [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src import sample
from src.cli import command


@dataclass
class EditConfig:
    """The keys at the root of conf/edit.yaml."""

    run: str
    verb: Literal["inpaint", "translate", "interpolate", "invert"]
    out: str
    image: str | None
    mask: str | None
    images: list[str] | None
    seeds: list[int] | None
    strength: float
    resample: int
    jump: int
    inversion_iterations: int
    num_frames: int
    num_samples: int
    sampler: dict
    guidance: dict
    labels: str | list[int] | None
    batch_size: int
    seed: int
    weights: str
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["32-true", "bf16-mixed"]


def edit(config: dict[str, Any], out: Path) -> None:
    """Writes grid.png, samples.npz, edit.png or edit-<i>.png, and where there is an error metrics.json, into `out`."""
    from src.evaluation.editing import edit

    edit(config, out)


def inherit(run: dict[str, Any], overrides: list[str]) -> list[str]:
    """Where no sampler is asked for: the run's own if it can do what is asked, or else conf/edit.yaml's.

    Inpainting has 50 steps of DDIM with all of DDPM's noise, without which what is painted hardly heeds what is kept;
    sampler=ddim has that noise, too, unless sampler.eta is given.
    """
    own = sample.inherit(run, overrides)
    verbs = [override.removeprefix("verb=") for override in overrides if override.startswith("verb=")]
    noisy = not own and "sampler=ddim" in overrides and not any(o.startswith("sampler.eta=") for o in overrides)
    if verbs and verbs[-1] == "inpaint" and noisy:
        return ["sampler.eta=1.0"]
    if not own or not verbs:
        return own
    if verbs[-1] == "inpaint":
        return ["sampler=ddim", "sampler.eta=1.0"]
    from src.build import build
    from src.evaluation.editing import refusal

    images = any(override.startswith("images=") for override in overrides)
    refused = refusal(verbs[-1], images, build(run["sampler"], "sampler"), build(run["schedule"], "schedule"))
    return [] if refused else own


main = command("edit", EditConfig, edit, inherit)

if __name__ == "__main__":
    main()
