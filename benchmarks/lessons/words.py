"""From results to sentences, whose claims are decided by the numbers, so that they stay true when these change."""

from collections.abc import Callable
from math import exp, log
from typing import Any, NamedTuple

from benchmarks.lessons.compare import Estimate, against, difference, estimate, verdict
from benchmarks.lessons.run import LONG, Results

Setting = dict[str, Any]
FEW = 10  # steps


class Lesson(NamedTuple):
    """What the page says of a lesson beside its numbers.

    Attributes:
        told: the folklore.
        label: of a setting, given what it sets.
        judge: what was measured, sentence by sentence.
    """

    title: str
    told: str
    label: Callable[[dict[str, Any]], str]
    judge: Callable[[Results], list[str]]


def label(results: Results, setting: Setting) -> str:
    return LESSONS[results["name"]].label(setting["values"])


def fd(setting: Setting) -> float:
    return estimate(setting["fd"]).value


def eps_error(setting: Setting, level: int) -> float:
    """Mean square error of eps at the level with this index, over seeds."""
    return estimate([errors[level] for errors in setting["eps"]]).value


def error_ratio(a: Setting, b: Setting, level: int) -> Estimate:
    """The logarithm of how many times as large as b's the error in the noise is of a, seed by seed."""
    return estimate([log(x[level] / y[level]) for x, y in zip(a["eps"], b["eps"], strict=True)])


def _quoted(results: Results, setting: Setting) -> str:
    return f"`{label(results, setting)}`"


def _more(a: Setting, b: Setting) -> Estimate:
    """How much farther a is from the real digits than b."""
    return difference(a["fd"], b["fd"])


def _farther(a: Setting, b: Setting) -> bool:
    return _more(a, b).clear and _more(a, b).value > 0


def _compare(results: Results, a: Setting, b: Setting) -> str:
    return against(_quoted(results, a), _quoted(results, b), _more(a, b))


def _ranked(results: Results) -> list[str]:
    """The best, and all others against it."""
    first, *others = sorted(results["settings"], key=fd)
    best = f"{_quoted(results, first)} comes nearest to the real digits: {estimate(first['fd'])}"
    return [best, *(_compare(results, other, first) for other in others)]


def _find(results: Results, key: str, value: Any) -> list[Setting]:
    return [setting for setting in results["settings"] if setting["values"][key] == value]


def _schedule(results: Results) -> list[str]:
    by_beta = sorted(results["settings"], key=lambda s: float(s["values"]["schedule.beta_end"]))
    right = next(s for s in by_beta if float(s["values"]["schedule.beta_end"]) == 0.02)
    sentences = _ranked(results)
    for extreme, what in ((by_beta[0], "gentle"), (by_beta[-1], "aggressive")):
        name = _quoted(results, extreme)
        otherwise = f"{name} is better than {_quoted(results, right)}"
        sentences.append(verdict(_more(extreme, right), f"{name} is too {what}", otherwise))
    rival = min((s for s in by_beta if s is not right), key=fd)
    wasted = f"{right['facts']['wasted']:.0%} of its steps are spent on what is noise already"
    as_told = f"nothing that was tried is better than {_quoted(results, right)}"
    if _more(rival, right).value <= 0:
        as_told += f"; {wasted}"
    otherwise = (
        f"{_quoted(results, right)}, chosen for larger images in colour, is not the best for these: {wasted}, and of "
        f"{_quoted(results, rival)} {rival['facts']['wasted']:.0%}"
    )
    return [*sentences, verdict(_more(rival, right), as_told, otherwise)]


def _skips(results: Results) -> list[str]:
    key = "model.skip_connections"
    whole, cut = (min(_find(results, key, value), key=fd) for value in ("True", "False"))
    better = f"each at its better learning rate, {_compare(results, cut, whole)}"
    sentences = [verdict(_more(cut, whole), better, better)]
    for best in (whole, cut):
        for other in _find(results, key, best["values"][key]):
            if other is not best:
                sentences.append(f"The learning rate alone: {_compare(results, other, best)}")
    for setting in results["settings"]:
        loss = estimate(setting["loss"]).value
        if loss > 0.99:
            name = _quoted(results, setting)
            sentences.append(f"{name} learned nothing: its loss is {loss:.2f}, and that of a network that says 0 is 1")
    low, high = (error_ratio(cut, whole, k) for k in (0, -1))
    numbers = (
        f"without skips the error in the noise is {exp(low.value):.1f} times as large at t={results['levels'][0]}, and "
        f"{exp(high.value):.1f} times at t={results['levels'][-1]}"
    )
    otherwise = (
        f"{numbers}. Where nearly all is noise, to predict it is to hand every pixel through: nothing to learn with "
        "skips, and hard through the bottom, where the image is one pixel"
    )
    per_seed = [log(x[0] / y[0]) - log(x[-1] / y[-1]) for x, y in zip(cut["eps"], whole["eps"], strict=True)]
    return [*sentences, verdict(estimate(per_seed), numbers, otherwise)]


def _time(results: Results) -> list[str]:
    (told,), (deaf,) = (_find(results, "model.time_conditioning", value) for value in ("True", "False"))
    name, other = _quoted(results, deaf), _quoted(results, told)
    loss, distance = estimate(deaf["loss"]).value / estimate(told["loss"]).value, fd(deaf) / fd(told)
    found = f"{name} has {loss:.2f} times the loss of {other}, and {distance:.1f} times its distance"
    if distance > loss > 1:
        found += ": what is little in one guess adds up over the steps of a sample"
    levels, guess = results["levels"], results["facts"]["guess"]
    worst = max(range(len(levels)), key=lambda k: error_ratio(deaf, told, k).value)
    ratio = exp(error_ratio(deaf, told, worst).value)
    guesses = ", ".join(f"{guess[k]:.0f} at t={levels[k]}" for k in (0, len(levels) // 4, len(levels) // 2))
    compared = _compare(results, deaf, told)
    return [
        verdict(_more(deaf, told), compared, compared),
        found,
        f"It loses most at t={levels[worst]}, where its error in the noise is {ratio:.1f} times that of {other}",
        "A noisy image shows how noisy it is: whoever knew all training images could tell t from x_t alone up to so "
        f"many steps: {guesses} (root mean square, in closed form)",
    ]


def _steps(results: Results) -> list[str]:
    def of(sampler: str, steps: int) -> Setting:
        return next(s for s in _find(results, "sampler", sampler) if s["values"]["steps"] == steps)

    long, best = of(*LONG), min(results["settings"], key=fd)
    sentences = []
    for quick, slow in (("ddim", "ddpm"), ("dpmpp_2m", "ddim")):
        compared = _compare(results, of(quick, FEW), of(slow, FEW))
        sentences.append(verdict(_more(of(slow, FEW), of(quick, FEW)), compared, compared))
    sentences.append(f"{_quoted(results, best)} comes nearest to the real digits: {estimate(best['fd'])}")
    if best is not long:
        sentences.append(_compare(results, long, best))
    for sampler in dict.fromkeys(setting["values"]["sampler"] for setting in results["settings"]):
        line = sorted(_find(results, "sampler", sampler), key=lambda s: s["values"]["steps"])
        enough = [s for s in line if s is not long and not _farther(s, long)]
        if enough:
            first = f"{enough[0]['values']['steps']} steps are enough for `{sampler}`"
            sentences.append(f"{first}: no difference to {_quoted(results, long)} can be shown, or it is nearer")
        else:
            sentences.append(f"`{sampler}` is farther than {_quoted(results, long)} with every number of steps tried")
    return sentences


def _objective(results: Results) -> list[str]:
    first, *others = sorted(results["settings"], key=fd)
    last = others[-1]
    apart = f"the choice matters: {_compare(results, last, first)}"
    (eps,), (x0,) = (_find(results, "objective", value) for value in ("eps", "x0"))
    sentences = [*_ranked(results), verdict(_more(last, first), apart, apart)]
    for k, sign, where in ((0, 1, "little"), (-1, -1, "much")):
        ratio = error_ratio(x0, eps, k)
        signed = Estimate(sign * ratio.value, ratio.error, ratio.n)
        numbers = (
            f"at {where} noise, t={results['levels'][k]}, `x0` makes {exp(ratio.value):.2f} times the error of `eps`"
        )
        sentences.append(verdict(signed, numbers, numbers))
    return sentences


LESSONS = {
    "schedule": Lesson(
        "The schedule",
        "A schedule that is too gentle leaves some of the image at its end, which sampling, from noise alone, begins "
        "without. One that is too aggressive destroys it at once and wastes the other steps. beta_end=0.02 is right.",
        lambda values: f"beta_end={values['schedule.beta_end']}",
        _schedule,
    ),
    "skips": Lesson(
        "Skip connections",
        "A U-Net needs its skip connections: they carry fine detail, which matters most where there is little noise.",
        lambda values: (
            f"{'skips' if values['model.skip_connections'] == 'True' else 'no skips'}, "
            f"lr {float(values['optimizer.lr']):g}"
        ),
        _skips,
    ),
    "time": Lesson(
        "The time embedding",
        "The network must be told t: the same x_t asks for another answer at another noise level.",
        lambda values: "told t" if values["model.time_conditioning"] == "True" else "not told t",
        _time,
    ),
    "steps": Lesson(
        "Sampler and steps",
        "DDPM needs its thousand steps. With few, DDIM is better, and DPM-Solver++, of second order, better yet.",
        lambda values: f"{values['sampler']}, {values['steps']} steps",
        _steps,
    ),
    "objective": Lesson(
        "The objective",
        "Noise, image, velocity or flow: each follows from any other and x_t, and yet the choice matters, for the loss "
        "weighs it. Predicting the noise is better where there is little of it, predicting the image where there is "
        "much.",
        lambda values: values["objective"],
        _objective,
    ),
}
