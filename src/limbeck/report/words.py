"""Numbers and tokens as text for readers."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

from limbeck.files import scaled
from limbeck.files import size as byte_size
from limbeck.report.run_files import Figure

Number = int | float
MISSING = "\u2013"
MINUS = "\u2212"
THIN = "\u202f"
"""Narrow space that does not break, between a number and its unit."""

TRIALS = {
    "initial": "Before training",
    "cross_entropy": "Cross-entropy only",
    "cross_entropy_by_kl": "Cross-entropy only, rate chosen by KL",
    "equal_time": "Cross-entropy only, as much time",
    "shuffled": "Shuffled teacher",
    "without_extra": "Without extra terms",
    "distilled": "Distilled",
    "teacher": "Teacher",
}
"""The models of an evaluation, as tables and plots name them."""

LETTERS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(token: str) -> str:
    r"""A token with its spaces and control characters to be seen, harmless in a terminal.

    Example:
        >>> visible(" a\n\x1b")
        '·a↵\\x1b'
    """
    return "".join(LETTERS[c] if c in LETTERS else printable(c) for c in token) or "∅"


def harmless(text: str) -> str:
    r"""A text as it is, but for control and direction characters, which are spelled out.

    Example:
        >>> harmless("a b\n\x1b")
        'a b\n\\x1b'
    """
    return "".join(c if c in " \n\t" else printable(c) for c in text)


def printable(character: str) -> str:
    """A character, or its escape where it controls, hides or reorders others."""
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Co", "Cs", "Cn"}
    return ascii(character)[1:-1] if hidden else character


def number(value: Number | None, digits: int = 3) -> str:
    r"""A figure with a fixed number of decimals.

    Example:
        >>> number(0.12345), number(4321.5), number(-1.5) == f"{MINUS}1.500"
        ('0.123', '4,321.5', True)
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    decimals = digits if abs(value) < 100 else min(digits, 1)
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def percent(fraction: Number | None, digits: int = 1) -> str:
    """A fraction of one in percent; small ones with a decimal more, and `< 0.01 %` for less.

    Example:
        >>> [percent(p).replace(THIN, " ") for p in (0.4217, 0.00042, 1e-5)]
        ['42.2 %', '0.04 %', '< 0.01 %']
    """
    if fraction is None or math.isnan(fraction):
        return MISSING
    digits += 0 < 100 * fraction < 10.0**-digits
    if 0 < 100 * fraction < 10.0**-digits:
        return f"< {10.0**-digits:.{digits}f}{THIN}%"
    return f"{number(100 * fraction, digits)}{THIN}%"


def whole_percent(value: Number | None) -> str:
    """A figure that is in percent already, without decimals."""
    return f"{number(value, 0)}{THIN}%"


def interval(figure: Figure | None, shown: Callable[[Number | None], str] = number) -> str:
    """A figure with the ends of its interval, if there are any to be seen.

    Example:
        >>> interval(Figure(0.5, 0.45, 0.55)), interval(Figure(0.0, 0.0, 0.0))
        ('0.500 [0.450, 0.550]', '0.000')
    """
    return MISSING if figure is None else f"{shown(figure.value)} {ends(figure, shown)}".rstrip()


def ends(figure: Figure, shown: Callable[[Number | None], str] = number) -> str:
    """The ends of a figure's interval; empty where they are not known or read the same."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = shown(figure.low), shown(figure.high)
    return f"[{low}, {high}]" if low != high else ""


def count(value: Number | None) -> str:
    """A count in thousands, millions or billions, three digits.

    Example:
        >>> count(134515008).replace(THIN, " "), count(950), count(1.5e9).replace(THIN, " ")
        ('135 M', '950', '1.50 B')
    """
    return thin(value, lambda number: scaled(number, ["", "k", "M", "B", "T"]))


def size(value: Number | None) -> str:
    """A size in bytes, three digits."""
    return thin(value, byte_size)


def thin(value: Number | None, text: Callable[[Number], str]) -> str:
    """A figure with its unit after a thin space."""
    known = value is not None and math.isfinite(value)
    return text(value).replace(" ", THIN) if known and value is not None else MISSING


def duration(seconds: Number | None) -> str:
    """A length of time.

    Example:
        >>> duration(3725.0), duration(42.31), duration(187.0)
        ('1 h 02 min', '42.3 s', '3 min 07 s')
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
