"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in input, options or files, said in one line that names the option and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def at_least_one(**options: int) -> None:
    """Raise UserError for the first option whose number is below 1."""
    for name, value in options.items():
        if value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
