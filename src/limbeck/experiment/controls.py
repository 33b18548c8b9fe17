"""What controls need: rows to exchange, steps that fit into the distilled student's time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.errors import ConfigError, DataError
from limbeck.experiment.batches import rollout_rows
from limbeck.experiment.parts import Parts
from limbeck.files import write_text
from limbeck.report.run_files import last_step, lines
from limbeck.teachers import require_local

STEPS = "steps.json"
"""In the trial's folder: its number of steps, and the recipe's at which it was found."""


def equal_time_steps(folder: Path, distilled: Path, baseline: Path, recipe_steps: int) -> int:
    """As many steps of the baseline as fit into the time in steps of the distilled student.

    The number is kept, so that a resumed trial takes as many. It is found again when the recipe has
    been given another number of steps, and is not lowered then.

    Args:
        folder: Of the trial that takes them.
        distilled: Folder of the finished distilled trial.
        baseline: Folder of the finished baseline.

    Raises:
        DataError: One of them has no timed step.
    """
    path = folder / STEPS
    kept: dict[str, Any] = {"steps": 1}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["recipe_steps"] == recipe_steps:
            return int(kept["steps"])
    last = [last_step(lines(each / "metrics.jsonl")) for each in (distilled, baseline)]
    if not all(each["seconds"] > 0 for each in last):
        raise DataError(
            f"evaluate.controls: equal_time needs the times of the steps in {distilled} and "
            f"{baseline}, and one has none. Train more steps, or leave the control out."
        )
    fitting = round(last[1]["step"] * last[0]["seconds"] / last[1]["seconds"])
    steps: int = max(kept["steps"], fitting)
    write_text(path, json.dumps({"steps": steps, "recipe_steps": recipe_steps}))
    return steps


def require_controls(parts: Parts) -> None:
    """Refuse a control that the teacher, or a rank's part of a step, cannot serve."""
    config, ranks = parts.config, parts.world.size
    if "shuffled" not in config.evaluate.controls:
        return
    require_local(parts.teacher, "evaluate.controls: the shuffled teacher reads other rows, which")
    rows = config.optim.rows_per_step(config.data.sequence_length)
    written = 0 if config.rollout is None else rollout_rows(config, config.rollout)
    if written // ranks + (rows - written) // ranks < 2:
        raise ConfigError(
            f"evaluate.controls: shuffled exchanges the rows that a rank has of a step, at least "
            f"2, and the {rows} rows of a step (optim.tokens_per_step / data.sequence_length) "
            f"leave a rank of {ranks} with fewer. Raise optim.tokens_per_step, or use fewer ranks."
        )
