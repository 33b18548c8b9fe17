"""TRL's DistillationTrainer on a given text; forward KL at T = 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer

from whole.plain_step import BETAS, CLIP

SETTINGS: Mapping[str, Any] = {
    "beta": 0.0,
    "max_grad_norm": CLIP,
    "adam_beta1": BETAS[0],
    "adam_beta2": BETAS[1],
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "report_to": [],
    "disable_tqdm": True,
}
"""What every use of it here has in common; `beta` 0 is forward KL."""


class OnWindows(DistillationTrainer):  # type: ignore[misc]  # TRL is not typed
    """Its own step, on given completions in place of generated ones.

    A window is a prompt of one token and its completion, so its loss is over the same tokens as
    that of the others. An example of the data set has it in `ids`.
    """

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, Any]]) -> Any:
        tokens = torch.stack([torch.as_tensor(each["ids"]) for each in inputs])
        return as_completions(tokens.to(self.accelerator.device))


def windows_trainer(
    models: tuple[Any, Any],
    tokenizer: Any,
    dataset: Any,
    settings: Mapping[str, Any],
    callbacks: Sequence[Any] = (),
) -> Any:
    """A trainer of a student on windows.

    Args:
        models: Student and teacher, of transformers.
        settings: Of a `DistillationConfig`, besides `SETTINGS`.
    """
    student, teacher = models
    return OnWindows(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**{**SETTINGS, **settings}),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def as_completions(tokens: Tensor) -> dict[str, Tensor]:
    """Windows of shape (B, T + 1) in the form in which the trainer holds generated text."""
    first, rest = tokens[:, :1], tokens[:, 1:]
    return {
        "prompt_ids": first,
        "prompt_mask": torch.ones_like(first),
        "completion_ids": rest,
        "completion_mask": torch.ones_like(rest),
        "num_items_in_batch": torch.tensor(float(rest.numel()), device=tokens.device),
    }
