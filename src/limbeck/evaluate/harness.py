"""lm-evaluation-harness: loading its tasks, running them, and its figures item by item."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from limbeck.errors import ConfigError, extra_needed
from limbeck.models import CausalLM, PreTrainedTokenizerBase, evaluating
from limbeck.registry import suggest


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """How the harness runs its tasks.

    Attributes:
        include: A folder with YAML files of tasks of the user's own.
        limit: Items of each task, at most.
        few_shot: Solved examples before each item; the task's own number by default.
        batch_size: Sequences of one forward pass.
        chat_template: Whether the tokenizer's chat template wraps each item.
    """

    include: Path | None
    limit: int | None
    few_shot: int | None
    batch_size: int
    chat_template: bool


@dataclass(frozen=True)
class TaskItems:
    """A model's scores on the items of a task, under one metric and filter.

    Attributes:
        keys: doc_hash of each item, and its number where items are equal.
        values: Score of each item; their mean is the harness's figure.
        floor: Expected score of a guess.
    """

    task: str
    metric: str
    keys: tuple[str, ...]
    values: Float64[np.ndarray, " items"]
    floor: Float64[np.ndarray, " items"]


def require_harness() -> str:
    """The version of lm-evaluation-harness."""
    with extra_needed("evaluate.suites: tasks", "lm-evaluation-harness", "eval"):
        return importlib.metadata.version("lm_eval")


class Harness:
    """Tasks of lm-evaluation-harness, found and loaded once."""

    def __init__(self, names: Sequence[str], options: HarnessOptions) -> None:
        """
        Raises:
            ConfigError: The harness is missing, does not know a task, or cannot load it.
        """
        self.version = require_harness()
        self._options = options
        self._names = list(names)
        self._manager = self._manager_of(names)
        load_tasks(self._manager, names)

    def _manager_of(self, names: Sequence[str]) -> Any:
        """The harness's index of tasks: the user's alone where it has all, since that is faster."""
        manager = importlib.import_module("lm_eval.tasks").TaskManager
        include = self._options.include
        if include is not None and not include.is_dir():
            raise ConfigError(
                f"evaluate.suites: include must be a folder of YAML files, got {include}."
            )
        where = None if include is None else str(include)
        found = manager(include_path=where, include_defaults=False)
        if not set(names) <= set(found.all_tasks):
            found = manager(include_path=where)
        if unknown := sorted(set(names) - set(found.all_tasks)):
            raise ConfigError(
                f"evaluate.suites: lm-evaluation-harness {self.version} has no task called "
                f"{unknown[0]!r}{suggest(unknown[0], found.all_tasks)}. `lm_eval ls tasks` lists "
                "them; YAML files of your own go into the folder of `include`."
            )
        return found

    def run(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        own: Sequence[Mapping[str, Any]] = (),
    ) -> list[TaskItems]:
        """A model's scores on every item, in the harness's order.

        Args:
            own: Configurations of further tasks.
        """
        hflm = importlib.import_module("lm_eval.models.huggingface").HFLM
        options = self._options
        with evaluating(model):
            wrapped = hflm(
                pretrained=model.hf_model,
                tokenizer=copy.deepcopy(tokenizer),  # the harness sets its padding token
                batch_size=options.batch_size,
            )
            results = importlib.import_module("lm_eval").simple_evaluate(
                model=wrapped,
                tasks=[*self._names, *map(dict, own)],
                num_fewshot=options.few_shot,
                limit=options.limit,
                apply_chat_template=options.chat_template,
                task_manager=self._manager,
                bootstrap_iters=0,
                log_samples=True,
            )
        return [items for task in results["samples"] for items in task_items(results, task)]


def load_tasks(manager: Any, names: Sequence[str]) -> None:
    """Load tasks with their data, which may be downloaded."""
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # whatever the task's own code or its download raises
            raise ConfigError(
                f"evaluate.suites: lm-evaluation-harness could not load the task {name!r} "
                f"({type(error).__name__}: {error}). Without a network, name tasks whose data is "
                "on this machine: a YAML with `dataset_path: json` in the folder of `include`."
            ) from error


def task_items(results: Mapping[str, Any], task: str) -> list[TaskItems]:
    """The per-item scores of each metric of a task that is a mean over its items.

    Others (corpus-level F1, perplexity) cannot be paired by item and are left out.
    """
    samples = results["samples"][task]
    higher = results["higher_is_better"].get(task, {})
    is_choice = results["configs"][task].get("output_type") == "multiple_choice"
    found = []
    for filter_name in sorted({sample["filter"] for sample in samples}):
        chosen = [sample for sample in samples if sample["filter"] == filter_name]
        keys = tuple(f"{sample['doc_hash']}:{sample['doc_id']}" for sample in chosen)
        floor = np.array([guess(sample) if is_choice else 0.0 for sample in chosen])
        for metric in sorted(set(chosen[0]["metrics"])):
            values = [sample[metric] for sample in chosen]
            if not higher.get(metric) or not all(np.isscalar(value) for value in values):
                continue
            scores = np.array(values, dtype=np.float64)
            whole = results["results"][task].get(f"{metric},{filter_name}")
            if isinstance(whole, float | int) and np.isclose(scores.mean(), whole, atol=1e-9):
                name = metric if filter_name == "none" else f"{metric} ({filter_name})"
                found.append(TaskItems(task, name, keys, scores, floor))
    return found


def guess(sample: Mapping[str, Any]) -> float:
    """Chance of a right guess among the choices of an item."""
    # For mutual information the harness scores each choice a second time, without its question.
    passes = 2 if "acc_mutual_info" in sample["metrics"] else 1
    return passes / len(sample["filtered_resps"])
