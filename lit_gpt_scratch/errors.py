"""Exception for user errors."""


class UserError(ValueError):
    """Exception for a mistake in a flag, file or config. The message is one line: what is wrong, where, and what to do.

    Every command prints the message without a traceback and exits with code 2. Any other exception is a bug, and its
    traceback is printed.
    """
