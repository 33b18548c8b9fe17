from dataclasses import replace

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller
from limbeck.teachers.local import LocalTeacher
from tests.models.tiny import random_batch, tiny_llama, tiny_model


def test_loss_is_the_textbook_formula_on_the_models_own_logits():
    student, teacher, batch = tiny_llama(2, 32), tiny_model("gemma2", layers=3), random_batch()
    shapes = PairShapes(2, 3, 32, 32, LayerMap.uniform(2, 3))
    config = ObjectiveConfig(alpha=0.7, temperature=2.0)
    distiller = Distiller(student, build_objective(config, shapes, head_budget_mb=1))
    online = LocalTeacher(teacher, distiller.objective.needs)
    loss, shares = distiller(batch, online.signal(batch), batch.num_scored())

    def logits(model):
        return model.hf_model(batch.input_ids).logits[batch.scored]

    ours, theirs = logits(student), logits(teacher).detach()
    cross_entropy = torch.nn.functional.cross_entropy(ours, batch.targets())
    soft = torch.nn.functional.kl_div(
        (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), log_target=True, reduction="none"
    )
    divergence = 4 * soft.sum(-1).mean()
    torch.testing.assert_close(loss, 0.7 * divergence + 0.3 * cross_entropy)
    torch.testing.assert_close(shares["cross_entropy"], cross_entropy.detach())
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("extra", [(), ({"type": "hidden_state", "weight": 0.3},)])
def test_weights_of_positions_multiply_every_term_and_its_gradient(extra):
    """The gradient is linear in them: two halves of the weights add up to the whole."""
    student, teacher, batch = tiny_llama(2, 32), tiny_llama(3, 32), random_batch()
    shapes = PairShapes(2, 3, 32, 32, LayerMap.uniform(2, 3))
    config = ObjectiveConfig(alpha=0.7, temperature=2.0, extra=extra)
    distiller = Distiller(student, build_objective(config, shapes, head_budget_mb=1))
    online = LocalTeacher(teacher, distiller.objective.needs)

    def outcome(weights):
        student.zero_grad()
        weighted = replace(batch, weights=weights)
        loss, _ = distiller(weighted, online.signal(weighted), batch.num_scored())
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])

    some = torch.rand(batch.scored.shape)
    whole, first, second = (outcome(each) for each in (None, some, 1 - some))
    for all_of_it, one, other in zip(whole, first, second, strict=True):
        torch.testing.assert_close(one + other, all_of_it, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(first[1], whole[1] / 2, rtol=1e-2)
    for scale in (1.0, 0.0, 2.0):
        loss, gradient = outcome(torch.full(batch.scored.shape, scale))
        torch.testing.assert_close(loss, scale * whole[0])
        torch.testing.assert_close(gradient, scale * whole[1], atol=1e-6, rtol=1e-4)
