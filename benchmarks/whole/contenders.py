"""One step of forward KL at T = 1, as limbeck, a plain loop and TRL take it.

Every contender gets a student and a teacher of its own or shared, takes AdamW steps with the same
rate, betas and clipping on the same windows, and returns the loss, so that losses can be compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from tests.models.tiny import tiny_tokenizer
from torch import Tensor
from torch.nn.functional import kl_div
from torch.nn.utils import clip_grad_norm_

from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig, OptimConfig
from limbeck.distributed import World, shard
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import CausalLM, Distiller, compile_blocks, copied_model
from limbeck.teachers import LocalTeacher
from limbeck.train import train_step
from limbeck.train.optimizers import make_optimizers

RATE, BETAS, CLIP = 1e-4, (0.9, 0.95), 1.0
Step = Callable[[Batch], float]


def limbeck(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """As `limbeck distill`, on a mesh where the world has one."""
    layers = student.num_layers, teacher.num_layers
    shapes = PairShapes(*layers, student.width, teacher.width, LayerMap.uniform(*layers))
    objective = build_objective(ObjectiveConfig(alpha=1.0), shapes, head_budget_mb="auto")
    distiller = Distiller(student, objective).to(world.device).train()
    frozen = LocalTeacher(teacher, objective.needs)
    frozen.shard(world)
    if world.mesh is not None:
        shard(distiller, student.blocks, world, compute_dtype=dtype)
    optim = OptimConfig(learning_rate=RATE, steps=1, betas=BETAS)
    optimizers = make_optimizers(distiller, optim, RATE, world.device)

    def step(batch: Batch) -> float:
        outcome = train_step(distiller, frozen, optimizers, [batch], world, max_grad_norm=CLIP)
        return outcome.loss

    return step


def compiled(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """The same with `memory.compile: true`, on a teacher of its own: the others share theirs."""
    weights, kind = teacher.hf_model.state_dict(), teacher.hf_model.dtype
    own = copied_model(teacher.config, weights, device=world.device, dtype=kind)
    for model in (student, own):
        compile_blocks(model)
    return limbeck(student, own, world, dtype)


def plain(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """Transformers' models, torch's own loss on whole logits, autocast, fused AdamW."""
    mine, frozen = student.hf_model.train(), teacher.hf_model.eval()
    optimizer = torch.optim.AdamW(
        mine.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True
    )
    device = world.device

    def step(batch: Batch) -> float:
        ids = batch.input_ids.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = mine(ids, use_cache=False).logits.flatten(0, 1)
            with torch.no_grad():
                other = frozen(ids, use_cache=False).logits.flatten(0, 1)
        student_logprobs, teacher_logprobs = (
            each.float().log_softmax(-1) for each in (logits, other)
        )
        loss = kl_div(student_logprobs, teacher_logprobs, log_target=True, reduction="batchmean")
        loss.backward()
        clip_grad_norm_(mine.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def trl(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """TRL's DistillationTrainer: its own step, on given completions in place of generated ones.

    A window is a prompt of one token and its completion, so both losses are over the same tokens.
    """
    from trl import DistillationConfig, DistillationTrainer  # noqa: PLC0415 - often absent

    class OnWindows(DistillationTrainer):  # type: ignore[misc]  # TRL is not typed
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            return inputs

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = DistillationConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=world.device.type == "cpu",
        bf16=dtype == torch.bfloat16, beta=0.0, learning_rate=RATE, max_grad_norm=CLIP,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], gradient_accumulation_steps=1,
        gradient_checkpointing=False, optim="adamw_torch_fused", report_to=[], max_steps=1,
        lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    trainer = OnWindows(
        model=student.hf_model, teacher_model=teacher.hf_model, args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w3"] * 8}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: Batch) -> float:
        loss = trainer.training_step(model, as_completions(batch, world.device), None)
        trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def as_completions(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch in the form in which TRL's trainer holds generated text."""
    first, rest = batch.input_ids[:, :1].to(device), batch.target_ids.to(device)
    return {
        "prompt_ids": first,
        "prompt_mask": torch.ones_like(first),
        "completion_ids": rest,
        "completion_mask": torch.ones_like(rest),
        "num_items_in_batch": torch.tensor(float(rest.numel()), device=device),
    }


CONTENDERS: dict[str, Callable[[CausalLM, CausalLM, World, torch.dtype], Step]] = {
    "limbeck": limbeck,
    "limbeck, compiled": compiled,
    "plain loop": plain,
    "TRL, DistillationTrainer": trl,
}


def importable(names: Iterable[str]) -> list[str]:
    """The contenders that are installed here."""
    has_trl = find_spec("trl") is not None
    return [name for name in names if has_trl or not name.startswith("TRL")]
