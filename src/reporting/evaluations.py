"""Scores that src.evaluate has left beside runs, or elsewhere: read, and given to the runs that they are of."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.reporting.folders import RunFolder

STAMP = "stamp"


@dataclass(frozen=True)
class Score:
    """One number of a metrics.json.

    Attributes:
        name: of the score, such as fd_pixels.
        value: None when it is not a finite number.
        error: its own standard error, where it can be told.
        better: "lower", "higher", or None where neither is.
        protocol: what two numbers must share to be compared, the sampling seed left out; plain, nested.
        seed: of the samples; numbers that differ by it alone are repeats.
        checkpoint: name of the file that was scored, and its sha256.
        stamp: where and with what it was computed.
        file: that it was read from.
    """

    name: str
    value: float | None
    error: float | None
    better: str | None
    protocol: dict[str, Any]
    seed: Any
    checkpoint: tuple[str, str]
    stamp: dict[str, Any]
    file: Path


def evaluations_of(run: RunFolder) -> list[Path]:
    """The metrics.json files that lie in a run's folder, the oldest first; those of src.evaluate -m lie deeper."""
    places = "*/metrics.json", "evaluation/*/metrics.json", "evaluation/*/*/metrics.json"
    found = {path for place in places for path in run.folder.glob(place)}
    return sorted(found, key=lambda path: (path.stat().st_mtime, str(path)))


def read_scores(path: Path) -> list[Score]:
    """The scores of one metrics.json; of samplers against steps, which has a picture of its own, none.

    Raises:
        UserError: when the file is not one that src.evaluate wrote.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get(STAMP), dict):
        raise UserError(f"{path} is no metrics.json of src.evaluate: it has no stamp")
    stamp = content[STAMP]
    of_sampler_sweep = (path.parent / "sweep.csv").is_file()
    scores = []
    for name, entry in content.items():
        if name == STAMP or of_sampler_sweep or not isinstance(entry, dict) or "protocol" not in entry:
            continue
        protocol = dict(entry["protocol"])
        seed = protocol.pop("seed", None)
        checkpoint = Path(str(stamp.get("checkpoint", ""))).name, str(stamp.get("checkpoint_sha256", ""))
        scores.append(
            Score(
                name=name,
                value=_finite(entry.get("value")),
                error=_finite(entry.get("standard_error")),
                better=entry.get("better"),
                protocol=protocol,
                seed=seed,
                checkpoint=checkpoint,
                stamp=stamp,
                file=path,
            )
        )
    return scores


def gather(runs: list[RunFolder], others: list[Path]) -> tuple[dict[str, list[Score]], list[str]]:
    """The scores of each run by its name, and notes on what was left out.

    Args:
        others: further metrics.json files, whose stamp tells of which run they are.

    Raises:
        UserError: when one of the others cannot be read, or is of none of the runs.
    """
    found: dict[str, list[Score]] = {run.name: [] for run in runs}
    notes = []
    for run in runs:
        for path in evaluations_of(run):
            try:
                found[run.name] += read_scores(path)
            except UserError as error:
                notes.append(f"{run.name}: {error}")
    for path in others:
        scores = read_scores(path)
        if scores:
            found[_owner(scores[0], runs, path)] += scores
    return {run.name: _newest(found[run.name], run, notes) for run in runs}, notes


def _owner(score: Score, runs: list[RunFolder], path: Path) -> str:
    """The run that a score is of: by the path in its stamp, or else by the checkpoint's sha256."""
    from src.files import sha256

    checkpoint, digest = Path(str(score.stamp.get("checkpoint", ""))), score.checkpoint[1]
    for run in runs:
        if checkpoint.resolve().is_relative_to(run.folder.resolve()):
            return run.name
    for run in runs:
        for file in sorted(run.folder.glob("checkpoints/*.ckpt")):
            if file.name == checkpoint.name and sha256(file) == digest:
                return run.name
    raise UserError(f"{path} is of {checkpoint}, which is of none of the runs of this report; leave it out")


def _newest(scores: list[Score], run: RunFolder, notes: list[str]) -> list[Score]:
    """One number for each protocol, checkpoint's name and seed: the last, which is of the checkpoint as it is now.

    A file of a checkpoint's name changes while its run is trained; numbers of two contents are no repeats.
    """
    scores = sorted(scores, key=lambda score: score.file.stat().st_mtime)
    newest: dict[tuple[str, str, str], Score] = {}
    contents: dict[tuple[str, str], str] = {}
    for score in scores:
        contents[score.name, score.checkpoint[0]] = score.checkpoint[1]
    for (name, file), digest in contents.items():
        last = max(score.file.stat().st_mtime for score in scores if (score.name, score.checkpoint[0]) == (name, file))
        contents[name, file] = _digest_now(run.folder / "checkpoints" / file, last) or digest
    for score in scores:
        if contents[score.name, score.checkpoint[0]] != score.checkpoint[1]:
            note = f"{run.name}: scores of an earlier {score.checkpoint[0]}, which training has replaced, are left out"
            if note not in notes:
                notes.append(note)
            continue
        newest[score.name, json.dumps([score.protocol, score.checkpoint], sort_keys=True), str(score.seed)] = score
    return list(newest.values())


@cache
def _digest_now(checkpoint: Path, scored: float) -> str | None:
    """Of a checkpoint that was written after it was scored; None of any other."""
    from src.files import sha256

    later = checkpoint.is_file() and checkpoint.stat().st_mtime > scored
    return sha256(checkpoint) if later else None


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None
