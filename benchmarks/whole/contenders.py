"""One step of forward KL at T = 1, as limbeck, a plain loop and TRL take it.

Every contender gets a student and a teacher of its own, takes AdamW steps with the same
rate, betas and clipping on the same windows, and returns the loss, so that losses can be compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
from datasets import Dataset
from tests.models.tiny import tiny_tokenizer

from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig, OptimConfig
from limbeck.distributed import World, shard
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import CausalLM, Distiller, compile_blocks
from limbeck.teachers import LocalTeacher
from limbeck.train import train_step
from limbeck.train.optimizers import make_optimizers
from whole.plain_step import BETAS, CLIP, adamw, plain_step

RATE = 1e-4
Step = Callable[[Batch], float]


def limbeck(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """As `limbeck distill`, on a mesh where the world has one."""
    layers = student.num_layers, teacher.num_layers
    shapes = PairShapes(*layers, student.width, teacher.width, LayerMap.uniform(*layers))
    objective = build_objective(ObjectiveConfig(alpha=1.0), shapes, head_budget_mb="auto")
    distiller = Distiller(student, objective).to(world.device).train()
    frozen = LocalTeacher(teacher, objective.needs)
    frozen.shard(world)
    shard(distiller, student.blocks, world, compute_dtype=dtype)
    optim = OptimConfig(learning_rate=RATE, steps=1, betas=BETAS)
    optimizers = make_optimizers(distiller, optim, RATE, world.device)

    def step(batch: Batch) -> float:
        outcome = train_step(distiller, frozen, optimizers, [batch], world, max_grad_norm=CLIP)
        return outcome.loss

    return step


def compiled(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """The same with `memory.compile: true`."""
    for model in (student, teacher):
        compile_blocks(model)
    return limbeck(student, teacher, world, dtype)


def plain(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """Transformers' models, torch's own loss on whole logits, autocast, fused AdamW."""
    mine, frozen = student.hf_model.train(), teacher.hf_model.eval()
    optimizer = adamw(mine, RATE)

    def step(batch: Batch) -> float:
        return plain_step(mine, frozen, optimizer, batch.input_ids.to(world.device), dtype)

    return step


def trl(student: CausalLM, teacher: CausalLM, world: World, dtype: torch.dtype) -> Step:
    """TRL's DistillationTrainer: its own step, on given completions in place of generated ones."""
    from whole.trl_step import windows_trainer  # noqa: PLC0415 - TRL is often absent

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": world.device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "learning_rate": RATE,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
    }
    dataset = Dataset.from_dict({"prompt": ["w3"] * 8})
    models = student.hf_model, teacher.hf_model
    trainer = windows_trainer(models, tokenizer, dataset, settings)
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: Batch) -> float:
        windows = torch.cat([batch.input_ids[:, :1], batch.target_ids], dim=1)
        loss = trainer.training_step(model, [{"ids": ids} for ids in windows], None)
        trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


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
