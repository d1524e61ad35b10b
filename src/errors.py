"""The one exception that means "the user can fix this"; commands print it as one sentence and exit with 2."""


class UserError(ValueError):
    """What was given, what is allowed, what to do: in one sentence."""
