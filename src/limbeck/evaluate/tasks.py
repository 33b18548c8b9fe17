"""The suite `tasks`: students and teacher on tasks of lm-evaluation-harness, item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, MinLen

from limbeck.data import spread
from limbeck.distributed import broadcast_object, together, unsharded
from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.harness import Harness, HarnessOptions, TaskItems
from limbeck.evaluate.paired import compared_items, same_items
from limbeck.evaluate.suites import Suite, SuiteContext, suites
from limbeck.evaluate.text import text_of
from limbeck.models import CausalLM
from limbeck.rollouts import Prompts
from limbeck.teachers import require_local

OWN = "held_out_choice"
"""The task made of the recipe's own held-out text: which continuation belongs to a passage?"""
CONTEXT_TOKENS = 48
CHOICE_TOKENS = 12
CHOICES = 4
MOST_ITEMS = 400


@suites.register("tasks")
class Tasks(Suite):
    """Tasks of lm-evaluation-harness, paired by item: quality retained of the teacher's.

    The harness runs each model on rank 0, while the other ranks wait.
    """

    def __init__(
        self,
        context: SuiteContext,
        *,
        tasks: Annotated[tuple[str, ...], MinLen(1)] = (OWN,),
        include: Path | None = None,
        limit: Annotated[int, Gt(0)] | None = None,
        few_shot: Annotated[int, Ge(0)] | None = None,
        batch_size: Annotated[int, Gt(0)] = 8,
        chat_template: bool = False,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        """
        Args:
            tasks: Names in the harness or in `include`; `held_out_choice` is made of held-out text.
            include: A folder with YAML files of tasks of your own.
            limit: Items of each task, at most.
            few_shot: Solved examples before each item; the task's own number by default.
            batch_size: Sequences of one forward pass.
            chat_template: Wrap each item in the tokenizer's chat template.
            seed: Of the choices of `held_out_choice`.
        """
        options = HarnessOptions(
            include=include,
            limit=limit,
            few_shot=few_shot,
            batch_size=batch_size,
            chat_template=chat_template,
        )
        self._context = context
        self._teacher = require_local(context.teacher, "evaluate.suites: the suite tasks")
        self._items = list(choice_items(context, seed)) if OWN in tasks else []
        if OWN in tasks and not self._items:
            raise ConfigError(
                f"evaluate.suites: {OWN} needs at least {CHOICES} test documents of over "
                f"{CONTEXT_TOKENS + CHOICE_TOKENS} tokens, and there are fewer. Name other tasks, "
                "or give evaluate.data longer text."
            )
        self._harness: Harness | None = None

        def load() -> None:
            self._harness = Harness([name for name in tasks if name != OWN], options)

        together(load, context.world, main_only=True)

    def measure(self, student: CausalLM) -> Mapping[str, Any]:
        return self.measure_all({"distilled": student})

    def measure_all(self, students: Mapping[str, CausalLM]) -> dict[str, Any]:
        """Every model's score on each task; retained quality, and paired differences."""
        found: dict[str, Any] = {}

        def run() -> None:
            with TemporaryDirectory() as folder:
                own = [self._own_task(Path(folder))] if self._items else []
                models = {**students, "teacher": self._teacher.model}
                found.update(self._compare(models, own))

        with unsharded(self._teacher.model):
            together(run, self._context.world, main_only=True)
        everywhere: dict[str, Any] = broadcast_object(found, self._context.world)
        return everywhere

    def _compare(
        self, models: Mapping[str, CausalLM], own: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """All models on all tasks; rank 0 only."""
        assert self._harness is not None, "this is rank 0"
        tokenizer = self._context.tokenizer
        measured = {n: self._harness.run(m, tokenizer, own) for n, m in models.items()}
        rows = []
        for each in zip(*measured.values(), strict=True):
            by_model = dict(zip(measured, each, strict=True))
            rows.append(
                {
                    "task": each[0].task,
                    "metric": each[0].metric,
                    **compared_items(paired(by_model), each[0].floor),
                }
            )
        return {"harness": self._harness.version, "rows": rows}

    def _own_task(self, folder: Path) -> dict[str, Any]:
        """The configuration of the task made of held-out text, with its items in a file."""
        path = folder / f"{OWN}.jsonl"
        lines = "".join(json.dumps(item) + "\n" for item in self._items)
        path.write_text(lines, encoding="utf-8")
        metrics = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ]
        return {
            "task": OWN,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": metrics,
            "metadata": {"version": 1.0},
        }


def paired(items: Mapping[str, TaskItems]) -> dict[str, np.ndarray]:
    """Each model's scores on the same items.

    Raises:
        DataError: The models were given different items.
    """
    if not same_items({name: each.keys for name, each in items.items()}):
        first = next(iter(items.values()))
        raise DataError(
            f"All models must be measured on the same items, and those of {first.task} differ. "
            "Does the task draw its items at random? Leave it out."
        )
    return {name: each.values for name, each in items.items()}


def choice_items(context: SuiteContext, seed: int) -> Iterator[dict[str, Any]]:
    """Passages of test documents with their continuation among those of three other documents."""
    data, documents = context.held_out.data, context.held_out.test_documents
    longest = data.facts["sequence_length"]
    prompts = Prompts(data, longest=longest, first_tokens=CONTEXT_TOKENS, documents=documents)
    endings: dict[int, str] = {}
    for index in range(len(prompts)):
        ids = prompts.following(index, CHOICE_TOKENS)
        text = text_of(context.tokenizer, ids)
        if len(ids) == CHOICE_TOKENS and text.strip() and text not in endings.values():
            endings[index] = text
    places = list(endings)
    generator = np.random.Generator(np.random.Philox(seed))
    if len(places) < CHOICES:
        return
    for own in spread(len(places), MOST_ITEMS):
        others = generator.permutation(len(places) - 1)[: CHOICES - 1]
        chosen = [places[(own + 1 + int(other)) % len(places)] for other in others]
        answer = int(generator.integers(CHOICES))
        chosen.insert(answer, places[own])
        yield {
            "question": text_of(context.tokenizer, prompts[places[own]]),
            "choices": [endings[place] for place in chosen],
            "answer": answer,
        }
