"""The exception for user mistakes."""


class UserError(ValueError):
    """A mistake in a flag, a file or a config: one line that says what is wrong, where, and what to do.

    Every command prints it without a traceback and exits with code 2. Any other exception is a bug and keeps its
    traceback.
    """
