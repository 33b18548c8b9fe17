import torch

from limbeck.config import ObjectiveConfig
from limbeck.layers import LayerMap
from limbeck.models import Distiller
from limbeck.objective import PairShapes, build_objective
from limbeck.teachers.online import OnlineTeacher
from tests.models.tiny import random_batch, tiny_llama, tiny_model


def test_loss_is_the_textbook_formula_on_the_models_own_logits():
    student, teacher, batch = tiny_llama(2, 32), tiny_model("gemma2", layers=3), random_batch()
    shapes = PairShapes(2, 3, 32, 32, LayerMap.uniform(2, 3))
    config = ObjectiveConfig(alpha=0.7, temperature=2.0)
    distiller = Distiller(student, build_objective(config, shapes, head_budget_mb=1))
    online = OnlineTeacher(teacher, distiller.objective.needs)
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
