"""Progress display of a recording."""

from __future__ import annotations

from rich.console import Console

from limbeck.progress import ProgressBar


class RecordingProgress:
    """Positions that were read, tokens a second, and bytes a token."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = ProgressBar(console, "recording", total)
        self._done = self._scored = self._bytes = 0

    def advance(self, positions: int) -> None:
        """Count positions that were read."""
        self._done += positions
        self._bar.advance(positions, self._numbers())

    def finished(self, shard: int, num_shards: int, scored: int, size_bytes: int) -> None:
        """Report a published shard."""
        self._scored += scored
        self._bytes += size_bytes
        self._bar.say(f"shard {shard + 1}/{num_shards}  {self._numbers()}")

    def close(self) -> None:
        """Stop the bar; its last state stays visible."""
        self._bar.close()

    def _numbers(self) -> str:
        per_token = f"  {self._bytes / self._scored:.1f} bytes/token" if self._scored else ""
        return f"{self._done / self._bar.seconds:,.0f} tokens/s{per_token}"
