"""A student that stops ending its texts, or repeats itself, is noticed early."""

import json

import pytest

from limbeck.rollouts.figures import WINDOW, Watch, figures_of


def rollouts(length=10, ended=True, repeats=False):
    tokens = [1] * length if repeats else list(range(length))
    finish = "end" if ended else "length"
    return [{"token_ids": tokens, "logprobs": [-0.5] * length, "finish": finish}]


def test_figures_are_means_over_tokens_and_rollouts():
    figures = figures_of([*rollouts(10), *rollouts(30, ended=False, repeats=True)])
    assert figures == {
        "rollout_length": 20,
        "rollout_ended": 0.5,
        "rollout_entropy": pytest.approx(0.5),
        "rollout_repeated": pytest.approx(26 / 34),
    }
    assert figures_of(rollouts(2))["rollout_repeated"] == 0


@pytest.mark.parametrize(
    ("later", "word"),
    [
        (rollouts(30), "rollouts grow: 30 tokens, 100% ended"),
        (rollouts(10, ended=False), "rollouts grow: 10 tokens, 0% ended"),
        (rollouts(10, repeats=True), "rollouts repeat themselves: 86% of 4-grams"),
        (rollouts(15), None),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_warning_on_degenerating_rollouts_appears_once_also_after_a_resume(
    tmp_path, later, word, resumed
):
    watch, found = Watch(tmp_path), []
    for step in range(4 * WINDOW):
        rows = rollouts() if step < WINDOW else later
        path = tmp_path / f"step-{step}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if resumed and step == WINDOW + 3:
            watch = Watch(tmp_path)
        found += watch.warnings(step, figures_of(rows))
    assert len(found) == (word is not None)
    assert word is None or found[0].startswith(word)
