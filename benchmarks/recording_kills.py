"""Record jobs killed with SIGKILL at random moments, each to end as the uninterrupted store.

    python benchmarks/recording_kills.py [--jobs 25] [--kills 3] [--seed 0]

Tiny models, the real command. Prints one line a job, and fails at the first store that differs.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path

from tests.experiment.recordings import contents, recorded
from tests.recording.test_record import FORMS, kill_and_go_on


def main() -> None:
    """Run the jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=25)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    for number, form in enumerate(FORMS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["LIMBECK_CACHE"] = str(folder / "cache")
            recorded(folder, form, layers=(2,))
            whole = contents(folder / "store")
            for job in range(number, arguments.jobs, len(FORMS)):
                moments = kill_and_go_on(folder, dice, arguments.kills)
                same = contents(folder / "store") == whole
                print(f"job {job + 1}: {form['type']}, killed at shards {moments}, same: {same}")
                assert same


if __name__ == "__main__":
    main()
