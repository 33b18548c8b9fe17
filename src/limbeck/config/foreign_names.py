"""Option names of other training tools, with the name of the same option in a recipe."""

from __future__ import annotations

FOREIGN_NAMES = {
    "lr": "optim.learning_rate",
    "max_lr": "optim.learning_rate",
    "batch_size": "optim.tokens_per_step",
    "global_batch_size": "optim.tokens_per_step",
    "gradient_accumulation_steps": "optim.tokens_per_step",
    "per_device_train_batch_size": "memory.micro_batch",
    "micro_batch_size": "memory.micro_batch",
    "gradient_checkpointing": "memory.activation_checkpointing",
    "epochs": "optim.steps",
    "num_epochs": "optim.steps",
    "num_train_epochs": "optim.steps",
    "max_steps": "optim.steps",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "packing": "data.pack",
    "sample_packing": "data.pack",
    "dataset": "data.path",
    "max_grad_norm": "optim.max_grad_norm",
    "grad_clip": "optim.max_grad_norm",
    "warmup": "optim.warmup_steps",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "optimizer": "optim.type",
    "weight_decay": "optim.weight_decay",
    "output_dir": "output",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluate.every",
    "eval_dataset": "evaluate.data",
    "report_to": "track",
    "kd_alpha": "objective.alpha",
    "kd_temperature": "objective.temperature",
}


def ours(name: str) -> str:
    """How an error message continues for a name of another tool; empty for any other name.

    Example:
        >>> ours("lr")
        ': here it is optim.learning_rate'
    """
    path = FOREIGN_NAMES.get(name.lower())
    if path is None:
        return ""
    unit = ", a number of tokens" if path == "optim.tokens_per_step" else ""
    unit = ", a number of optimizer steps" if "epochs" in name.lower() else unit
    return f": here it is {path}{unit}"
