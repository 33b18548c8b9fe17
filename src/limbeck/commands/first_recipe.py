"""The recipe of `limbeck distill TEACHER STUDENT DATA`: what it chooses, and why."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from limbeck.commands.short_form import pruned_student, short_name
from limbeck.config import override_in
from limbeck.errors import ConfigError
from limbeck.experiment import load
from limbeck.files import expanded, write_text
from limbeck.models import ModelSource
from limbeck.models.source import find, read_config

LONGEST = 1024
"""Positions of a row where both models can read as many."""

COMMENTS = {
    "student.by": "which layers to keep: those that change their input most, by one pass",
    "student.tokenizer": "the teacher's chat template and end token, also where they are its own",
    "data.path": "the first row decides how it is read (data.type: auto)",
    "data.sequence_length": "positions of a row; longer texts are cut into windows",
    "objective.alpha": "weight of the teacher; the text's own next token has the rest",
    "objective.temperature": "1 trains on the teacher's own probabilities",
    "optim.learning_rate": "try three, e.g. [1e-4, 3e-4, 1e-3], once evaluate.data is set",
    "optim.epochs": "passes over the text; or steps: N",
    "optim.tokens_per_step": "positions of one optimizer step",
    "optim.warmup_steps": "a share of all steps",
    "output": "run directory: student, report, checkpoints",
}
"""Comments of the recipe, by option."""


def write_recipe(words: Sequence[str], *, keep_run: bool) -> Path:
    """Choose a recipe for a teacher, a student and data, write it beside its run directory."""
    places = [word for word in words if "=" not in word]
    if len(places) != 3:
        raise ConfigError(
            "distill takes a recipe, or a teacher, a student and data, and then key=value, got "
            f"{' '.join(places)}. For example: limbeck distill TEACHER 1.5B train.jsonl."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "Several processes need a recipe that is there already. Write one with limbeck distill "
            "TEACHER STUDENT DATA --plan, and name it after torchrun -m limbeck distill."
        )
    tree = changed(chosen(*places), [word for word in words if "=" in word])
    output = expanded(str(tree["output"]))
    path = output.with_name(f"{output.name}.yaml")
    if (output / "recipe.yaml").exists():
        if not keep_run:
            raise ConfigError(
                f"output: {output} already holds a run. Add --resume to continue it, --overwrite "
                "to delete it, or choose another place with output=DIR."
            )
        if path.exists():
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, commented(tree))
    try:
        load(path)
    except ConfigError:
        path.unlink()
        raise
    return path


def chosen(teacher: str, student: str, data: str) -> dict[str, Any]:
    """A recipe for a pair and a text."""
    pruned, name = pruned_student(student)
    models = [teacher] if pruned else [teacher, student]
    length = min([LONGEST, *(limit for each in models if (limit := max_positions(each)))])
    return {
        "teacher": {"type": "online", "path": teacher},
        "student": pruned or {"type": "pretrained", "path": student, "tokenizer": "teacher"},
        "data": {"path": data, "sequence_length": length},
        "objective": {"alpha": 0.9, "temperature": 1.0, "divergence": "forward_kl"},
        "optim": {
            "learning_rate": 3e-4 if pruned else 2e-5,
            "epochs": 1,
            "tokens_per_step": 16 * length,
            "warmup_steps": 0.05,
        },
        "output": f"runs/{short_name(teacher)}-to-{name}",
    }


def max_positions(model: str) -> int | None:
    """Positions a model can read, from its configuration; None where it names none."""
    source = ModelSource(model)
    place = find(source)
    if place.name.endswith(".gguf"):
        return None
    limit = read_config(source, place).to_dict().get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def changed(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The recipe with the user's changes; `optim.steps` takes the place of `optim.epochs`."""
    base = OmegaConf.create(dict(tree))
    for override in overrides:
        override_in(base, override)
        if override.startswith("optim.steps="):
            OmegaConf.update(base, "optim.epochs", None)
    made = OmegaConf.to_container(base)
    assert isinstance(made, dict), "a mapping stays a mapping"
    if made["optim"].get("epochs") is None:
        made["optim"].pop("epochs", None)
    return {str(key): value for key, value in made.items()}


def commented(tree: Mapping[str, Any]) -> str:
    """The recipe as YAML, each choice with its reason."""
    head = "# Written by `limbeck distill TEACHER STUDENT DATA`; change it as you like.\n"
    if "evaluate" not in tree:
        head += "# Add held-out text to measure the student: evaluate: {data: heldout.jsonl}\n"
    return head + "".join(f"{line}\n" for line in lines(tree))


def lines(tree: Mapping[str, Any]) -> Iterator[str]:
    """Lines of YAML, two levels deep, with comments."""
    for section, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{section}:"
            for option, each in value.items():
                yield line(f"  {option}: {flow(each)}", f"{section}.{option}")
        else:
            yield line(f"{section}: {flow(value)}", section)


def line(text: str, path: str) -> str:
    """A line with its comment."""
    return f"{text:<40}  # {COMMENTS[path]}" if path in COMMENTS else text


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    body = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return body.removesuffix("...\n").strip()
