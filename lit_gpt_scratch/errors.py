"""The one exception for what a user can get wrong."""


class UserError(ValueError):
    """A mistake in a flag, a file or a config: the message says what, where, and what to do, in one line.

    Every door prints it without a traceback and exits with code 2. Anything else that is raised is a
    bug and keeps its traceback.
    """
