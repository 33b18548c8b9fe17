"""The report shows what a student wrote first, and last."""

import json

import pytest

from limbeck.report.rollout_texts import before_after
from limbeck.report.run_report import write_report
from tests.report.example_run import write_run
from tests.tokenizers.small import small


def write_rollouts(folder, steps, prompts):
    """One rollout a step; the prompts take turns."""
    tokenizer = small()
    tokenizer.save_pretrained(folder / "student")
    (folder / "rollouts").mkdir()
    for step in range(steps):
        ids = [tokenizer.encode(text) for text in (prompts[step % len(prompts)], f"at {step} <b>")]
        row = {"prompt_ids": ids[0], "token_ids": ids[1], "logprobs": [], "finish": "end"}
        (folder / "rollouts" / f"step-{step}.jsonl").write_text(json.dumps(row) + "\n")


def test_the_first_text_of_a_prompt_stands_beside_its_last(tmp_path):
    write_rollouts(tmp_path, 12, ["What rises?", "What boils?"])
    pairs = before_after(tmp_path)
    found = [(p.before.prompt, p.before.text, p.after.prompt, p.after.text) for p in pairs]
    assert all(pair.is_same for pair in pairs)
    assert found == [
        ("What rises?", "at 0 <b>", "What rises?", "at 10 <b>"),
        ("What boils?", "at 1 <b>", "What boils?", "at 11 <b>"),
    ]


@pytest.mark.parametrize(("steps", "shown"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_without_a_prompt_that_came_back_any_first_and_last_texts_are_shown(steps, shown, tmp_path):
    write_rollouts(tmp_path, steps, [f"number {n}" for n in range(9)])
    pairs = before_after(tmp_path)
    assert len(pairs) == shown
    assert not any(pair.is_same for pair in pairs)
    assert [p.before.step for p in pairs] == list(range(shown))
    assert [p.after.step for p in pairs] == [steps - 1 - n for n in range(shown)]


def test_the_page_shows_both_texts_and_runs_neither(tmp_path):
    write_run(tmp_path)
    write_rollouts(tmp_path, 12, ["What rises?"])
    page = write_report(tmp_path).read_text()
    assert "after the same prompts" in page
    assert "at 0 &lt;b&gt;" in page
    assert "at 11 &lt;b&gt;" in page
    assert "Step 12" in page
