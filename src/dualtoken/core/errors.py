"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in input, options or files, said in one line that names the option and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """
