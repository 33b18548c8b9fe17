"""The same losses in other projects' code, called as their trainers call them.

Each is made to give the gradient of the *same* formula as ours, by weights and scalar factors
alone; where that is not possible the formula is left to those that have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from head.inputs import Inputs
from head.ours import gradients


def liger(
    inputs: Inputs, beta: float, alpha: float, temperature: float, compiled: bool
) -> list[Tensor]:
    """Liger 0.8.5's chunked JSD: no Triton in it, but `torch.compile` by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # It does not multiply by T^2; its weights are free.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - alpha,
        weight_soft_loss=alpha * temperature**2,
        beta=beta,
        temperature=temperature,
        compiled=compiled,
    )
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs
    return gradients(loss(hidden, weight, teacher_hidden, teacher_weight, targets), inputs)


def torchtune(inputs: Inputs, alpha: float) -> list[Tensor]:
    """The chunked forward KL and cross-entropy of torchtune 0.6.1, T = 1, its eight chunks.

    Its KL leaves the teacher's entropy out, which has no gradient.
    """
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    hard, soft = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
    labels = inputs.targets[None]
    student = [
        rows @ inputs.weight.t() for rows in inputs.hidden[None].chunk(hard.num_output_chunks, 1)
    ]
    with torch.no_grad():
        teacher = [
            rows @ inputs.teacher_weight.t()
            for rows in inputs.teacher_hidden[None].chunk(hard.num_output_chunks, 1)
        ]
    loss = (1 - alpha) * hard(student, labels) + alpha * soft(student, teacher, labels)
    return gradients(loss, inputs)


def trl_kernel(inputs: Inputs, beta: float, temperature: float) -> list[Tensor]:
    """TRL 1.16's loss of `DistillationTrainer`, on tiles of the logits; it has no cross-entropy."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        inputs.hidden[None],
        inputs.teacher_hidden[None],
        inputs.weight,
        inputs.teacher_weight,
        torch.ones_like(inputs.targets[None]),
        beta=beta,
        temperature=temperature,
    )
    return gradients(loss * temperature**2, inputs)


def trl_gkd(inputs: Inputs, beta: float, temperature: float) -> list[Tensor]:
    """TRL 1.16's loss of `GKDTrainer`, on whole logits; it has no cross-entropy."""
    from trl.experimental.gkd import GKDTrainer

    student = inputs.hidden[None] @ inputs.weight.t()
    with torch.no_grad():
        teacher = inputs.teacher_hidden[None] @ inputs.teacher_weight.t()
    loss = GKDTrainer.generalized_jsd_loss(
        student, teacher, inputs.targets[None], beta=beta, temperature=temperature
    )
    return gradients(loss * temperature**2, inputs)
