"""The one exception that is meant for the person at the keyboard, and the checks of numbers that raise it."""

import math
from numbers import Integral, Real
from typing import Any


class UserError(Exception):
    """A mistake in input, options or files, said in one line that names the option and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value. Raises UserError for what is no whole number from `least` to `most`."""
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if not known or value < least or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most}"
        raise UserError(f"{name} {value!r}: give at least {least}{limit}, a whole number")
    return int(value)


def at_least_one(**options: Any) -> None:
    """Raise UserError for the first option that is no whole number from 1."""
    for name, value in options.items():
        whole_number(f"--{name}", value, 1)


def finite_number(name: str, value: Any) -> float:
    """The value. Raises UserError for what is no number, not a number or infinite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{name} {value!r}: give a finite number")
    return value
