"""Several runs in one recipe; a run may start from the student of an earlier one.

A stage lists the options in which it differs from the rest of the recipe. `stage:NAME` in place of
a path is the student of an earlier stage.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.config import RunConfig, leaves, parse, refusal, validated
from limbeck.distributed import World, is_main_process, locked
from limbeck.errors import ConfigError
from limbeck.experiment.directory import refuse_both
from limbeck.experiment.loading import OPEN_PARTS, problems
from limbeck.experiment.run import Run, RunResult, extends_recipe, progress_console
from limbeck.files import expanded, manifest
from limbeck.registry import Problem

REFERENCE = "stage:"
"""Prefix of a reference to an earlier stage."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Stage:
    """One run of several.

    Attributes:
        name: Also the name of its run directory.
    """

    name: str
    config: RunConfig

    @property
    def is_done(self) -> bool:
        """Whether its student is intact and its report, which is written last, exists."""
        folder = self.config.output
        return (folder / "report.html").exists() and manifest(folder / "student") is not None


def load_stages(path: Path | str, overrides: Iterable[str] = ()) -> tuple[Stage, ...]:
    """The stages of a recipe, all checked; none if it has no `stages`.

    Args:
        overrides: Each `a.b=value`, for the options all stages inherit.

    Raises:
        ConfigError: With one line a mistake, each beginning with the path of the field.
    """
    path = Path(path)
    tree = parse(path, overrides)
    if "stages" not in tree:
        return ()
    entries = tree.pop("stages")
    wrong = list(list_problems(entries))
    output = expanded(str(tree.get("output", ".")))
    stages = []
    if not wrong:
        names = [each["name"] for each in entries]
        trees = [
            inherited(tree, {k: v for k, v in each.items() if k != "name"}) for each in entries
        ]
        found: list[list[Problem]] = []
        for place, (name, whole) in enumerate(zip(names, trees, strict=True)):
            if "output" in tree:
                whole["output"] = str(output / "stages" / name)
            known = {n: str(output / "stages" / n / "student") for n in names[:place]}
            mistakes = list(reference_problems(whole, known))
            checked = validated(referred(whole, known), problems)
            found.append([*mistakes, *checked.problems])
            if checked.config is not None:
                stages.append(Stage(name, checked.config))
        wrong = gathered_problems(found)
    if wrong:
        raise refusal(path, wrong)
    return tuple(stages)


def list_problems(entries: Any) -> Iterator[Problem]:
    """What is wrong with the list of stages itself."""
    if not isinstance(entries, list) or not entries:
        yield Problem("stages", f"must be a list of stages, at least one, got {entries!r}.")
        return
    seen: set[str] = set()
    for place, stage in enumerate(entries):
        at = f"stages[{place}]"
        if not isinstance(stage, Mapping) or "name" not in stage:
            yield Problem(at, f"must be a mapping with a name, got {stage!r}.")
            continue
        name = stage["name"]
        if not isinstance(name, str) or not NAME.fullmatch(name):
            yield Problem(f"{at}.name", f"must be letters, digits, '.', '_' and '-', got {name!r}.")
        elif name in seen:
            yield Problem(f"{at}.name", f"must be no other stage's, got {name!r} again.")
        seen.add(str(name))
        for option in ("output", "stages"):
            if option in stage:
                yield Problem(
                    f"{at}.{option}",
                    f"is an option of the whole recipe, got {stage[option]!r}. Leave it out: a "
                    "stage's run directory is stages/NAME in output.",
                )


def inherited(whole: Mapping[str, Any], change: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """A recipe with the options of a stage: sections are merged, components with a type replaced.

    Example:
        >>> inherited({"optim": {"steps": 9, "type": "sgd"}}, {"optim": {"steps": 3}})
        {'optim': {'steps': 3, 'type': 'sgd'}}
        >>> inherited({"student": {"type": "depth", "keep": 9}}, {"student": {"type": "copy"}})
        {'student': {'type': 'copy'}}
    """
    merged = dict(whole)
    for key, value in change.items():
        place, old = f"{at}{key}", merged.get(key)
        replaces = place in OPEN_PARTS and isinstance(value, Mapping) and "type" in value
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not replaces:
            merged[key] = inherited(old, value, f"{place}.")
        else:
            merged[key] = value
    return merged


def reference_problems(tree: Mapping[str, Any], known: Mapping[str, str]) -> Iterator[Problem]:
    """References to stages that do not come earlier."""
    for at, value in leaves(tree):
        name = name_in(value)
        if name is not None and name not in known:
            before = f"Earlier stages: {', '.join(known)}." if known else "It is the first."
            yield Problem(at, f"must refer to an earlier stage, got {value!r}. {before}")


def referred(tree: Any, known: Mapping[str, str]) -> Any:
    """The same tree with each reference replaced by a folder."""
    if isinstance(tree, Mapping):
        return {key: referred(value, known) for key, value in tree.items()}
    if isinstance(tree, list):
        return [referred(value, known) for value in tree]
    return known.get(name_in(tree) or "", tree)


def name_in(value: Any) -> str | None:
    """The stage that a value refers to, or None."""
    if isinstance(value, str) and value.startswith(REFERENCE):
        return value.removeprefix(REFERENCE)
    return None


def gathered_problems(found: Sequence[Sequence[Problem]]) -> list[Problem]:
    """Problems of all stages; one that every stage has is inherited, and listed once."""
    several = len(found) > 1
    common = [p for p in found[0] if several and all(p in others for others in found)]
    rest = [
        Problem(f"stages[{place}].{problem.at}", problem.text)
        for place, mistakes in enumerate(found)
        for problem in mistakes
        if problem not in common
    ]
    return [*common, *rest]


def run_stages(
    stages: Sequence[Stage],
    tell: Callable[[Stage, RunResult], None],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Run stages one after the other, each in its own run directory.

    After a crash at any moment, call it again with `resume`: finished stages are skipped, and the
    interrupted one resumes from its last checkpoint.

    Args:
        tell: Called on rank 0 with the result of each stage, finished ones included.

    Raises:
        ConfigError: A stage's directory holds another run.
        Stopped: A signal came; everything is saved.
    """
    output = stages[0].config.output.parent.parent
    is_main = is_main_process()
    with ExitStack() as stack:
        if is_main:  # the process group exists within a stage only
            alone = World(0, 1, torch.device("cpu"))
            stack.enter_context(locked(output, alone, resumes=resume))
        require_stages(output, stages, resume=resume, overwrite=overwrite)
        if overwrite and is_main:
            shutil.rmtree(output / "stages", ignore_errors=True)
        done = [stage.is_done and not overwrite for stage in stages]
        for place, (stage, is_done) in enumerate(zip(stages, done, strict=True)):
            if is_main:
                state = "is done" if is_done else f"starts in {stage.config.output}"
                text = f"stage {place + 1} of {len(stages)}, {stage.name}, {state}"
                progress_console().print(text, markup=False, highlight=False)
            result = result_of(stage) if is_done else run_stage(stage, resume=resume)
            if is_main:
                tell(stage, result)


def require_stages(output: Path, stages: Sequence[Stage], *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory with other contents, and stages started with another recipe."""
    refuse_both(resume=resume, overwrite=overwrite)
    if (output / "recipe.yaml").exists():
        raise ConfigError(
            f"output: {output} already holds a run without stages. Choose another output."
        )
    started = [stage.name for stage in stages if (stage.config.output / "recipe.yaml").exists()]
    if started and not (resume or overwrite):
        raise ConfigError(
            f"output: {output} already holds stages ({', '.join(started)}). Add --resume to "
            "continue, --overwrite to delete them (in Python resume=True, overwrite=True), or "
            "choose another output."
        )
    if resume:
        for stage in stages:
            if extends_recipe(stage.config.output, stage.config):
                raise ConfigError(
                    f"optim.steps: a stage resumes with the steps it began with, and {stage.name} "
                    "has more now. The stages after it would need its new student: choose another "
                    "output, or --overwrite."
                )


def run_stage(stage: Stage, *, resume: bool) -> RunResult:
    """Run one stage and release its memory."""
    with Run(stage.config) as run:
        result = run.train(resume=resume)
    del run
    gc.collect()  # models are in reference cycles, and the next stage needs the memory
    return result


def result_of(stage: Stage) -> RunResult:
    """The result of a finished stage, from its run directory."""
    folder = stage.config.output
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return RunResult(folder / "student", evaluation, folder / "report.html")
