"""The exception for user errors."""


class UserError(ValueError):
    """Raised for a mistake in a flag, file or config. The message is one line: what is wrong, where, and what to do.

    Every command prints it without a traceback and exits with code 2. Any other exception is a bug, and its traceback
    is printed.
    """
