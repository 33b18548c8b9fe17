"""The plain loop's job: `python -m job_table.plain_job PLAN.json`."""

from __future__ import annotations

from transformers import get_scheduler
from whole.plain_step import adamw, plain_step

from job_table.peer import peer_of_command_line


def main() -> None:
    """Train and save."""
    peer = peer_of_command_line()
    plan = peer.plan
    optimizer = adamw(peer.student, plan.learning_rate)
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=plan.warmup_steps,
        num_training_steps=plan.steps,
    )
    peer.begin()
    for step, windows in enumerate(peer.windows.split(plan.rows), start=1):
        plain_step(peer.student, peer.teacher, optimizer, windows[:, :-1], peer.dtype)
        schedule.step()
        peer.finish_step(step)
    peer.finish()


if __name__ == "__main__":
    main()
