"""The job of TRL's DistillationTrainer: `python -m job_table.trl_job PLAN.json`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from whole.trl_step import windows_trainer

from job_table.peer import Peer, peer_of_command_line


class Watch(TrainerCallback):
    """Tells the peer when steps begin and end."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 0:
            self._peer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._peer.finish_step(state.global_step)


def main() -> None:
    """Train and save."""
    peer = peer_of_command_line()
    plan = peer.plan
    settings = {
        "output_dir": plan.folder,
        "use_cpu": True,
        "bf16": plan.dtype == "bfloat16",
        "learning_rate": plan.learning_rate,
        "max_steps": plan.steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": plan.warmup_steps,
        "per_device_train_batch_size": plan.rows,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    ids = peer.windows.tolist()
    dataset = Dataset.from_dict({"prompt": [""] * len(ids), "ids": ids})
    models = peer.student, peer.teacher
    windows_trainer(models, peer.tokenizer, dataset, settings, [Watch(peer)]).train()
    peer.finish()


if __name__ == "__main__":
    main()
