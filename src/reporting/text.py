"""Numbers as a reader wants them: as many digits as are known, and units that need few of them."""

import math
from collections.abc import Iterable

FEW, MANY = 1e-4, 1e6  # outside, numbers are written with exponents


def decimals(numbers: list[tuple[float, float | None]]) -> int | None:
    """Digits after the point for a column of means and errors: two of the largest error and one of the smallest, or
    four of the smallest mean; at most seven of the largest mean. None where exponents are better.
    """
    means = [abs(mean) for mean, _ in numbers if mean]
    if means and not FEW <= max(means) < MANY:
        return None
    errors = [error for _, error in numbers if error]
    wanted = (
        [1 - _magnitude(max(errors)), -_magnitude(min(errors))] if errors else [3 - _magnitude(mean) for mean in means]
    )
    largest = _magnitude(max(means)) if means else 0
    return max(0, min(max(wanted, default=2), 6 - largest))  # beyond seven digits nobody reads


def number(value: float, places: int | None = None) -> str:
    """A number with so many digits after the point; without a number of them, with four that count."""
    if not math.isfinite(value):
        return "not a number"
    if places is not None:
        return f"{value:,.{places}f}"
    if value and not FEW <= abs(value) < MANY:
        return f"{value:.3e}"
    return f"{value:,.{max(0, 3 - _magnitude(value))}f}" if value else "0"


def error(value: float, places: int | None = None) -> str:
    """An error with so many digits after the point; of one too small for them, that it is."""
    if places is not None and 0 < value < 0.5 * 10**-places:
        return f"<{10**-places:.{places}f}"
    return number(value, places)


def duration(seconds: float) -> str:
    """36 s, 2 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"


def amount(value: float, unit: str = "") -> str:
    """1.24 G, 35.7 M, 850: three digits and a prefix."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def listed(names: list[str]) -> str:
    """a, b and c."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def counted(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def grouped(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Each sentence once, after the names that it is said of: `1, 2 and 3 others: ...`."""
    who: dict[str, list[str]] = {}
    for name, note in notes:
        who.setdefault(note, []).append(name)
    return [f"{few(names)}: {note}" for note, names in who.items()]


def few(names: list[str]) -> str:
    """All of a few names, or the first of many and how many there are."""
    return listed(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} others"
