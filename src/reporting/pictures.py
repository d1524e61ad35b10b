"""Pictures for the page: grids of samples at several times of training, and what else lies in a run's folder.

A grid was written enlarged by a whole factor; the page gets the pixels themselves, and enlarges them by whole factors
again, so that every pixel of a sample is a square. Where all grids together are too large for one page, it gets their
upper rows, and fewer times of training, evenly chosen, the first and the last among them.
"""

import base64
import io
import math
from dataclasses import dataclass

from src.reporting.folders import RunFolder
from src.shapes import as_pair

GRIDS = 12_000_000  # bytes of all grids of a page, before they become text and a third more
OTHERS = 3_000_000  # and of all other pictures
TIMES = 40  # of training at most,
FRAMES = 300  # and grids of all runs together;
ENOUGH = 6  # times of training, for which rows of the grids are given up
KINDS = {  # what is looked for in a run's folder, and what it shows
    "trajectory.gif": "Denoising: noise becomes images",
    "trajectory.png": "Denoising, step by step: x_t above the x0 that is predicted from it",
    "neighbours.png": "Samples (top) above the training images nearest to them",
    "memorisation.png": "The most suspicious samples (top) above their nearest training images",
    "sweep.png": "Score against the sampler's evaluations of the network",
}


@dataclass(frozen=True)
class Picture:
    """An image in the page.

    Attributes:
        uri: data:, the file itself.
        size: width and height in pixels.
    """

    uri: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Grids:
    """A run's grids of samples.

    Attributes:
        frames: by the step at which they were drawn, rising.
        shape: (C, H, W) of one image.
    """

    run: str
    frames: dict[int, Picture]
    shape: tuple[int, int, int]


def grids(runs: list[RunFolder], notes: list[str]) -> list[Grids]:
    """The grids of all runs that have any; what had to be left out is said in notes."""
    runs = [run for run in runs if run.samples]
    steps = sorted({step for run in runs for step in run.samples})
    if not steps:
        return []
    last = sum(len(_grid(run, max(run.samples), 1.0, [])) for run in runs)
    most = max(1, min(len(steps), TIMES, FRAMES // len(runs)))
    share = next((s for s in (1.0, 0.5) if GRIDS / (s * max(last, 1)) >= min(most, ENOUGH)), 0.25)
    kept = _fewer(steps, max(1, min(most, int(GRIDS / (share * max(last, 1))))))
    found = {(run.name, step): _grid(run, step, share, notes) for run in runs for step in kept if step in run.samples}
    while len(kept) > 1 and sum(len(found.get((run.name, step), b"")) for run in runs for step in kept) > GRIDS:
        kept = _fewer(kept, len(kept) - 1)
    if len(kept) < len(steps):
        notes.append(f"Of {len(steps)} times of training the grids of {len(kept)} are in this page, evenly chosen")
    if share < 1:
        notes.append("Of each grid the upper rows alone are in this page, so that it stays small")
    made = []
    for run in runs:
        frames = {step: _picture(data) for step in kept if (data := found.get((run.name, step)))}
        if frames:
            channels, size = run.config["data"]["channels"], as_pair(run.config["data"]["image_size"])
            made.append(Grids(run.name, frames, (channels, *size)))
    return made


def others(runs: list[RunFolder], notes: list[str]) -> list[tuple[str, str, str, Picture]]:
    """Run, file, what it shows, and the picture, of those that sampling and evaluation have left in runs' folders."""
    shown, size = [], 0
    for run in runs:
        for kind, title in KINDS.items():
            files = [*run.folder.glob(kind), *run.folder.glob(f"*/{kind}"), *run.folder.glob(f"evaluation/*/{kind}")]
            newest = max(files, key=lambda path: (path.stat().st_mtime, str(path)), default=None)
            if newest is None:
                continue
            where = str(newest.relative_to(run.folder))
            try:
                data = newest.read_bytes()
                picture = _picture(data, kind.rpartition(".")[2])
            except (OSError, SyntaxError, ValueError) as error:
                notes.append(f"{run.name}: {where} cannot be read ({error})")
                continue
            if size + len(data) > OTHERS:
                notes.append(f"{run.name}: {where} is left out, so that the page stays small")
                continue
            size += len(data)
            shown.append((run.name, where, title, picture))
    return shown


def _fewer(steps: list[int], number: int) -> list[int]:
    """So many of the steps, the last and, of several, the first among them."""
    if number == 1:
        return steps[-1:]
    return [steps[round(i * (len(steps) - 1) / (number - 1))] for i in range(number)]


def _grid(run: RunFolder, step: int, share: float, notes: list[str]) -> bytes:
    """A PNG of a grid as it was before it was enlarged, or of a share of its rows, at least two.

    Of a file that cannot be read nothing, and a note.
    """
    import numpy as np
    from PIL import Image

    path = run.samples[step]
    try:
        with Image.open(path) as image:
            image.load()
            array = np.asarray(image.convert("L" if image.mode in ("L", "1") else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow says of a damaged file
        notes.append(f"{run.name}: samples/{path.name} cannot be read ({error})")
        return b""
    height = as_pair(run.config["data"]["image_size"])[0]
    factor = _enlarged(array, height)
    array = array[::factor, ::factor]
    gap = max(1, height // 14)  # of src.pictures.grid
    rows = (array.shape[0] - gap) // (height + gap)
    if share < 1 and rows > 2:
        array = array[: max(2, math.ceil(rows * share)) * (height + gap) + gap]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def _enlarged(array, height: int) -> int:  # type: ignore[no-untyped-def]
    """The factor by which `enlarge` has made the grid larger, if it has."""
    from src.pictures import enlarge

    factor = enlarge(height)
    if array.shape[0] % factor or array.shape[1] % factor:
        return 1
    small = array[::factor, ::factor]
    same = (small.repeat(factor, axis=0).repeat(factor, axis=1) == array).all()
    return factor if same else 1


def _picture(data: bytes, kind: str = "png") -> Picture:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        size = image.size
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", size)
