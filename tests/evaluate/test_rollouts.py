"""Figures of a student's own text are means over the tokens it wrote."""

import pytest
import torch

from limbeck.evaluate.rollouts import rollout_figures
from limbeck.losses import SignalNeeds
from limbeck.rollouts import Sampling, sample
from limbeck.teachers import LocalTeacher
from tests.models.tiny import tiny_llama
from tests.train.toy import ALONE, VOCABULARY


def test_figures_are_those_of_one_pass_over_each_text():
    student = tiny_llama(2, 16, VOCABULARY, seed=1)
    teacher = tiny_llama(4, 24, VOCABULARY, seed=2)
    student.hf_model.generation_config.eos_token_id = [4, 9, 17]
    prompts = [[5], [3, 9, 1, 7], [2, 2], [30, 11, 4], [8, 1, 6]]
    rollouts = sample(student, prompts, Sampling(tokens=6), [10 + place for place in range(5)])
    reverse, forward, logprob = [], [], []
    for row in rollouts:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        begin = len(row.prompt_ids) - 1
        q, p = (m.logits(ids).detach().log_softmax(-1)[0, begin:-1] for m in (student, teacher))
        reverse += (q.exp() * (q - p)).sum(-1).tolist()
        forward += (p.exp() * (p - q)).sum(-1).tolist()
        logprob += p.gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0].tolist()
    reader = LocalTeacher(teacher, SignalNeeds(distribution=True))
    expected = {
        "rollout_forward_kl": sum(forward) / len(forward),
        "rollout_reverse_kl": sum(reverse) / len(reverse),
        "rollout_teacher_logprob": sum(logprob) / len(logprob),
    }
    found = rollout_figures(student, reader, rollouts, ALONE, head_budget_mb=1)
    assert found == pytest.approx(expected, abs=1e-5)
