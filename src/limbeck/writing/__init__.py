"""Text that a teacher writes: its answers to prompts, in a file that a run trains on."""

from limbeck.writing.filters import filters
from limbeck.writing.writing import Summary, Writing, write_problems

__all__ = ["Summary", "Writing", "filters", "write_problems"]
