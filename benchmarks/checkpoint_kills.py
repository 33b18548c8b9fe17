"""A run that saves in the background after each step, killed with SIGKILL at random moments.

    python benchmarks/checkpoint_kills.py [--kills 1000] [--seed 0]

After each kill every published checkpoint must be whole, and the newest no older than before.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.distributed.test_saving import kill_often


def main() -> None:
    """Run, kill, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        newest = kill_often(Path(name), arguments.kills, arguments.seed)
    print(f"{arguments.kills} kills, no unusable checkpoint; the newest is of step {newest}")


if __name__ == "__main__":
    main()
