"""A run that saves after each step, killed with SIGKILL at random moments from its first save on.

    PYTHONPATH=src:. python benchmarks/checkpoint_kills.py [--kills 1000] [--ranks 1] [--seed 0]

Every other life saves in the background. After each kill every published checkpoint must be whole,
the newest no older than before, and the next life must resume from it. Counts the kills that left a
half-written checkpoint behind, until there are as many as asked for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.distributed.processes import live
from tests.distributed.test_saving import hunt

KILLS_OF_A_RUN = 25
"""Then a new run begins, because each life reads the log of all before it."""


def main() -> None:
    """Kill runs until enough kills met a save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start, kills, halves, runs = time.perf_counter(), 0, 0, 0
    while halves < arguments.kills:
        with tempfile.TemporaryDirectory() as name:
            seed = arguments.seed + runs
            assert live(hunt, Path(name), KILLS_OF_A_RUN, seed, arguments.ranks) == 0
            found = json.loads((Path(name) / "hunt.json").read_text())
        kills, halves, runs = kills + KILLS_OF_A_RUN, halves + found["halves"], runs + 1
        took = time.perf_counter() - start
        print(f"{kills} kills, {halves} within a save, 0 unusable states, {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
