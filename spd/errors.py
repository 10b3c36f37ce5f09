"""The one exception type that means "what you passed in is wrong"."""


class InputError(ValueError):
    """Bad input from the user: the message names the argument, what was expected and what came.

    The command line prints it as one line and exits with status 2; everything else that is raised is a bug of ours
    and keeps its traceback.
    """
