"""The one exception that means: the user must change something."""


class UserError(ValueError):
    """A full sentence for the user: what is wrong, where, the value, and the remedy.

    The command line prints it without a traceback and exits with 2. It takes a single string, so
    it survives pickling between Ray processes.
    """


class CheckpointError(UserError):
    """The fault is a checkpoint's own: it is missing or damaged, or that of another model."""
