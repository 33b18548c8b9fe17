"""Silences progress bars and load reports of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging

SWITCHES: Any = logging
"""The functions have no annotations."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off progress bars and everything below errors, and restore both afterwards."""
    verbosity, shows_bars = SWITCHES.get_verbosity(), SWITCHES.is_progress_bar_enabled()
    SWITCHES.set_verbosity_error()
    SWITCHES.disable_progress_bar()
    try:
        yield
    finally:
        SWITCHES.set_verbosity(verbosity)
        if shows_bars:
            SWITCHES.enable_progress_bar()
