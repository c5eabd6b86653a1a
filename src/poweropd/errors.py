"""The two ways a command ends badly. A message is one line that says what to do."""


class UsageError(ValueError):
    """The recipe, the command line or an input it names is wrong: exit status 2."""


class RunError(RuntimeError):
    """A run cannot go on: exit status 1. What was finished is kept."""
