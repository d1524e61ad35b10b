"""What a reader must know before comparing numbers: whether code, versions, devices and images were the same."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from src.reporting.evaluations import Score
from src.reporting.folders import RunFolder
from src.reporting.scores import Column, protocols_differ
from src.reporting.settings import shown
from src.reporting.text import few, listed


def provenance(runs: list[RunFolder], evaluations: dict[str, list[Score]], columns: list[Column]) -> list[str]:
    """Sentences on what differs, beside what was varied; none where all is the same."""
    trained = [(run.name, run.summary) for run in runs if run.summary]
    scored = [(name, score.stamp) for name, scores in evaluations.items() for score in scores]
    notes = [
        _differ("The runs were trained with different code: {}.", trained, lambda s: _commit(s.get("git_commit"))),
        *_versions("The runs were trained with different versions of", trained),
        _differ(
            "Speeds and times do not compare, for the runs had different devices or precisions: {}.",
            trained,
            lambda s: f"{s.get('world_size', 1)} x {s.get('device')}, {s.get('precision')}",
        ),
        _differ("Scores were computed with different code: {}.", scored, lambda s: _commit(s.get("git_commit"))),
        *_versions("Scores were computed with different versions of", scored),
        _differ("Scores were computed on different devices: {}.", scored, lambda s: str(s.get("device"))),
        _differ("The runs are of different images: {}.", [(run.name, run.config) for run in runs], _images),
    ]
    several = protocols_differ(columns)
    if several:
        notes.append(
            f"{listed(several)} {'was' if len(several) == 1 else 'were'} computed under different protocols, and "
            "numbers of two protocols do not compare: each has a column of its own, whose title says what differs."
        )
    return [note for note in notes if note]


def same_images(runs: list[RunFolder]) -> bool:
    """Whether the images of all runs have one shape, so that their samples start from the same noise."""
    shapes = {json.dumps([run.config["data"].get(k) for k in ("channels", "image_size")]) for run in runs}
    return len(shapes) < 2


def _differ(sentence: str, of: Iterable[tuple[str, dict[str, Any]]], what: Callable[[dict[str, Any]], str]) -> str:
    """The sentence, with the values and who has each; nothing where all have the same."""
    who: dict[str, list[str]] = {}
    for name, content in of:
        names = who.setdefault(what(content), [])
        if name not in names:
            names.append(name)
    if len(who) < 2:
        return ""
    return sentence.format("; ".join(f"{value} ({few(names)})" for value, names in who.items()))


def _versions(start: str, of: list[tuple[str, dict[str, Any]]]) -> list[str]:
    packages = dict.fromkeys(package for _, content in of for package in content.get("versions", {}))
    notes = []
    for package in packages:
        sentence = f"{start} {package}: {{}}."
        notes.append(_differ(sentence, of, lambda s, p=package: str(s.get("versions", {}).get(p))))  # type: ignore[misc]
    return notes


def _images(config: dict[str, Any]) -> str:
    data = config["data"]
    source = data.get("source") or {}
    name = source.get("name") or str(source.get("_target_", data.get("_target_"))).rpartition(".")[2]
    return f"{name}, {data.get('channels')} x {shown(data.get('image_size'))}"


def _commit(commit: str | None) -> str:
    if commit is None:
        return "no commit"
    return commit[:8] + ("+dirty" if commit.endswith("+dirty") else "")
