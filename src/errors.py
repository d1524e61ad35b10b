"""The one exception that means "the user can fix this", which commands print as a sentence and exit with 2."""


class UserError(ValueError):
    """What was given, what is allowed, what to do: in one sentence."""


def printable(text: str) -> str:
    """In one line that any terminal shows: what names of files may hold besides letters, escaped as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def reason(error: BaseException) -> str:
    """The first sentence of what a library says."""
    return str(error).split("\n")[0].split(". ")[0] or type(error).__name__
