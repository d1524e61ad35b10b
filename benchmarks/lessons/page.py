"""docs/lessons.md, from the results of all lessons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lessons.compare import LEVEL, OTHERWISE, TOLD, UNDECIDED, difference, estimate, seeds, threshold
from benchmarks.lessons.run import SAMPLES, Results
from benchmarks.lessons.words import LESSONS, eps_error, fd, label

HEAD = """# Lessons

Five questions about diffusion models, each one command, and what came out. `make lessons` runs them all and writes this
page: its numbers, its pictures, and the sentences around them, which follow from the numbers. All train the tutorial's
network at half its width on 8x8 digits (`experiment=tutorial_digits`), on two CPU cores. Of a lesson that was run by
its command alone, `python -m src.report sweep=outputs/multirun/lessons/...` makes a page of scores, curves and samples.

**Distance** is the Fréchet distance between the pixels, in [0, 1], of {samples} samples and of the training images; the
smaller the better. Two halves of the training images have {floor:.3f}. **±** is the standard error over {seeds}. Runs
of one seed share weights, order, noise and latents, so settings are compared seed by seed, and a difference counts when
it is more than {threshold:.1f} standard errors (Student's t, {level:.0%}). {seeds_capital} show large differences, not
small ones.
"""
FOOT = """
---

Measured on {date} on {device}; {versions}. {minutes:.0f} minutes in all, training and scoring.
"""


def page(all_results: Sequence[Results], images: str = "images/lessons") -> str:
    """The page as Markdown.

    Args:
        all_results: of lessons, in their order on the page.
        images: where the pictures lie, relative to the page; each is named by its lesson.
    """
    first = all_results[0]
    n = len(first["settings"][0]["seeds"])
    stated = {"samples": SAMPLES, "floor": first["facts"]["floor"], "seeds": seeds(n), "level": LEVEL}
    limit = threshold(n) if n > 1 else float("inf")
    parts = [HEAD.format(**stated, threshold=limit, seeds_capital=seeds(n).capitalize())]
    parts += [_section(number, results, images) for number, results in enumerate(all_results, 1)]
    stamp = all_results[-1]["stamp"]
    versions = ", ".join(f"{name} {stamp['versions'][name]}" for name in ("python", "torch", "lightning"))
    minutes = sum(results["seconds"] for results in all_results) / 60
    parts.append(FOOT.format(date=stamp["date"][:10], device=stamp["device"], versions=versions, minutes=minutes))
    return "\n".join(parts)


SCORED = {
    "steps": (
        ", and for each of its runs `python -m src.evaluate run=... "
        "'sweep.samplers=[ddpm,ddim,dpmpp_2m]' 'sweep.steps=[5,10,20,50,100]'`"
    )
}
LEGEND = """
*Loss: of held-out images, mean over noise levels. Error in the noise: mean square of predicted less true eps.*
"""
LEGENDS = {
    "schedule": """
*Steps wasted: the share of noise levels that sampling could begin below, and a perfect network would miss less than 1%
by it. Missed by a perfect network: by beginning with pure noise, where training ends with some of the image left.*
""",
    "steps": "",
}


def _section(number: int, results: Results, images: str) -> str:
    lesson, name = LESSONS[results["name"]], results["name"]
    found = "\n".join(f"- {_sentence(sentence)}" for sentence in lesson.judge(results))
    cost = f"{results['jobs']} runs, {results['seconds'] / 60:.1f} minutes with their scores"
    return f"""## {number}. {lesson.title}

`python -m src.train experiment=lessons/{name}`{SCORED.get(name, "")} ({cost})

*What one is told:* {lesson.told}

*What was measured:*

{found}

![{lesson.title}: samples from the same noise]({images}/{name}.png)

{_table(results)}
{LEGENDS.get(name, LEGEND)}"""


def _sentence(text: str) -> str:
    for head in (TOLD, OTHERWISE, UNDECIDED):
        if text.startswith(head):
            return f"**{head.strip()}** {text.removeprefix(head)}."
    return f"{text[:1].upper()}{text[1:]}."


def _table(results: Results) -> str:
    return {"steps": _steps_table}.get(results["name"], _settings_table)(results)


def _settings_table(results: Results) -> str:
    """A row a setting, with what the lesson is about."""
    best = min(results["settings"], key=fd)
    levels = [0, len(results["levels"]) // 2, len(results["levels"]) - 1]
    header = ["", "distance", "to the best"]
    if results["name"] == "schedule":
        header += ["alpha at the end", "steps wasted", "missed by a perfect network"]
    else:
        header += ["loss", *(f"error in the noise at t={results['levels'][k]}" for k in levels)]
    rows = []
    for setting in results["settings"]:
        d = difference(setting["fd"], best["fd"])
        row = [label(results, setting), str(estimate(setting["fd"])), "" if setting is best else f"{d.value:+.3f}"]
        if d.error is not None and setting is not best:
            row[-1] += f" ± {d.error:.3f}"
        if results["name"] == "schedule":
            facts = setting["facts"]
            row += [f"{facts['alpha']:.2g}", f"{facts['wasted']:.0%}", f"{min(facts['missed'], 1):.1%}"]
        else:
            row += [str(estimate(setting["loss"])), *(f"{eps_error(setting, k):.3f}" for k in levels)]
        rows.append(row)
    return _markdown(header, rows)


def _steps_table(results: Results) -> str:
    """A row a sampler, a column a number of steps."""
    cells: dict[str, dict[int, str]] = {}
    for setting in results["settings"]:
        values = setting["values"]
        cells.setdefault(values["sampler"], {})[values["steps"]] = str(estimate(setting["fd"]))
    steps = sorted({s for row in cells.values() for s in row})
    return _markdown(
        ["distance after", *(f"{s} steps" for s in steps)],
        [[sampler, *(row.get(s, "") for s in steps)] for sampler, row in cells.items()],
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(path: Path, all_results: Sequence[dict[str, Any]]) -> None:
    from src.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(page(all_results))
