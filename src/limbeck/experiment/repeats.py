"""The distilled student and the baseline again with other seeds: how much figures vary by chance.

They start from the same student, and differ in the order of the text, and where there are any in
dropout, adapters and terms that are drawn at random. A grid of learning rates is not searched
again. Their weights are deleted once they are measured.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.config import RunConfig
from limbeck.distributed import decided, together
from limbeck.evaluate.scores import Scores, over_seeds
from limbeck.experiment.parts import Parts
from limbeck.experiment.score_files import read_scores
from limbeck.experiment.trials import Trial, TrialRunner, best, trials_of

REPEATED = ("distilled", "cross_entropy")
METRICS = ("forward_kl", "top1_agreement", "cross_entropy")


def repeats(config: RunConfig, chosen: Mapping[str, Trial]) -> Iterator[tuple[RunConfig, Trial]]:
    """Each repetition of the best trials, with the recipe of its seed."""
    for seed in range(config.seed + 1, config.seed + config.evaluate.seeds):
        for name in REPEATED:
            if name in chosen:
                folder = config.output / "stages" / f"{name}-seed-{seed}"
                yield replace(config, seed=seed), replace(chosen[name], folder=folder)


def num_students(config: RunConfig) -> int:
    """Students that a recipe trains, repetitions included."""
    again = config.evaluate.seeds - 1
    return len(trials_of(config)) + again * (1 + (config.evaluate.baseline is not None))


def run_repeats(
    parts: Parts,
    runner: TrialRunner,
    trials: Sequence[Trial],
    run_trial: Callable[[TrialRunner, Trial], None],
) -> None:
    """Train and measure the repetitions that are not done; every rank calls it.

    Args:
        runner: That of the finished trials.
        run_trial: Trains a trial with a runner.
    """
    world = parts.world
    if parts.config.evaluate.seeds == 1:
        return
    places = decided(lambda: {n: trials.index(t) for n, t in best(trials).items()}, world)
    chosen = {name: trials[place] for name, place in places.items()}
    for config, trial in repeats(parts.config, chosen):
        if not decided(trial.scores.exists, world):
            run_trial(runner.for_parts(replace(parts, config=config)), trial)
            gc.collect()  # models are in reference cycles, and the next trial needs memory
        together(trial.drop_weights, world, main_only=True)


def forget_repeats(config: RunConfig) -> None:
    """Delete all repetitions, because the trials they repeat are trained again or longer."""
    for name in REPEATED:
        for folder in (config.output / "stages").glob(f"{name}-seed-*"):
            shutil.rmtree(folder)


def seed_figures(config: RunConfig, chosen: Mapping[str, Trial]) -> dict[str, Any]:
    """Figures of every seed, their means, and those of the differences between both students.

    Args:
        chosen: The best trials.
    """
    if config.evaluate.seeds == 1:
        return {}
    found = {name: [tested(chosen[name].scores)] for name in REPEATED if name in chosen}
    for _, trial in repeats(config, chosen):
        found[trial.name].append(tested(trial.scores))
    known = [metric for metric in METRICS if metric in found["distilled"][0].metrics]
    figures: dict[str, Any] = {
        "seeds": [config.seed + i for i in range(config.evaluate.seeds)],
        "trials": {
            name: {metric: over_seeds(scores, metric) for metric in known}
            for name, scores in found.items()
        },
    }
    if "cross_entropy" in found:
        figures["difference"] = {
            metric: over_seeds(found["cross_entropy"], metric, found["distilled"])
            for metric in known
        }
    return {"seeds": figures}


def tested(path: Path) -> Scores:
    """A trial's scores on the test documents."""
    scores = read_scores(path).test
    assert scores is not None, "the recipe names held-out text"
    return scores
