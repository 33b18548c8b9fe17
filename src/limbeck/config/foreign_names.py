"""Option names of other training tools, with the name of the same option in a recipe."""

from __future__ import annotations

NAMES = {
    "teacher": "teacher_model teacher_model_name_or_path load_in_4bit load_in_8bit "
    "quantization_config",
    "student": "model model_name_or_path base_model student_model",
    "data.path": "dataset datasets dataset_name dataset_path train_dataset train_file",
    "data.mix": "dataset_mixer dataset_mixture data_mix interleave mixture_weights",
    "data.split": "dataset_split train_split",
    "data.subset": "dataset_config dataset_config_name config_name",
    "data.revision": "dataset_revision",
    "data.columns": "dataset_text_field text_column column_mapping field_messages",
    "data.sequence_length": "max_length max_seq_length max_seq_len seq_length "
    "seq_len sequence_len cutoff_len model_max_length block_size",
    "data.pack": "packing packed sample_packing",
    "data.max_documents": "max_samples max_train_samples",
    "objective.alpha": "kd_alpha kd_ratio distill_alpha distillation_alpha",
    "objective.temperature": "kd_temperature kd_temp distill_temperature distillation_temperature",
    "objective.divergence": "kd_loss loss_type loss_fn beta",
    "optim.type": "optimizer",
    "optim.learning_rate": "lr max_lr peak_lr",
    "optim.steps": "max_steps num_steps max_train_steps train_steps total_steps",
    "optim.epochs": "num_epochs num_train_epochs max_epochs",
    "optim.tokens_per_step": "batch_size global_batch_size "
    "train_batch_size gradient_accumulation_steps gradient_accumulation",
    "optim.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
    "optim.schedule_options": "lr_scheduler_kwargs",
    "optim.betas": "adam_beta1 adam_beta2",
    "optim.eps": "adam_epsilon adam_eps",
    "optim.max_grad_norm": "grad_clip gradient_clipping clip_grad_norm",
    "rollout.share": "lmbda on_policy_fraction",
    "rollout.tokens": "max_new_tokens max_completion_length",
    "evaluate.data": "eval_dataset eval_file val_dataset validation_file val_set_size",
    "evaluate.every": "eval_steps eval_interval",
    "evaluate.patience": "early_stopping early_stopping_patience",
    "memory.micro_batch": "per_device_train_batch_size micro_batch_size per_device_eval_batch_size",
    "memory.activation_checkpointing": "gradient_checkpointing enable_activation_checkpointing",
    "memory.compile": "torch_compile compile_model use_compile",
    "checkpoint.every": "save_steps save_interval checkpointing_steps",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.student_dtype": "save_dtype save_precision output_dtype",
    "parallel.compute_dtype": "bf16 fp16 mixed_precision torch_dtype precision",
    "parallel.shard": "fsdp deepspeed",
    "parallel.replicate": "dp_replicate_size hybrid_shard hsdp",
    "parallel.timeout_s": "ddp_timeout",
    "trainable.lora": "use_lora lora_r lora_rank peft_config adapter",
    "trainable.lora.quantize": "qlora use_qlora",
    "track": "report_to wandb_project wandb_run_name run_name experiment_name logging_dir "
    "callbacks",
    "output": "output_dir",
    "seed": "random_seed data_seed",
}
"""By option of a recipe: names of other tools, and names that look like them."""

FOREIGN_NAMES = {name: path for path, names in NAMES.items() for name in names.split()}

UNITS = {
    "teacher": "{type: online, path: NAME}; with quantize: 4bit or 8bit in few bits",
    "rollout.share": "of the rows that the student writes",
    "optim.tokens_per_step": "the positions of one optimizer step: rows of a pass * "
    "data.sequence_length * accumulation steps * processes",
    "memory.micro_batch": "rows of one pass on one process; it changes memory, not results",
    "optim.warmup_steps": "a number of steps, or a share of all steps between 0 and 1",
    "optim.betas": "both in a list",
}
"""What an option counts, where other tools count something else."""


def ours(name: str) -> str:
    """How an error message continues for a name of another tool; empty for any other name.

    Example:
        >>> ours("max_steps")
        ': here it is optim.steps'
    """
    path = FOREIGN_NAMES.get(name.lower())
    if path is None:
        return ""
    unit = f" ({UNITS[path]})" if path in UNITS else ""
    return f": here it is {path}{unit}"
