"""A step is the same however it was cut up, and equal to the plain formula."""

import math

import pytest
import torch

from limbeck.data.source import RowsOfStep
from limbeck.distributed.stopping import SIGNALS
from limbeck.train import accumulate, count_step, train_step
from tests.train.toy import ALONE, ToyBatches, toy_pair

ROWS = [0, 1, 2, 3, 4, 5]


def sgd(distiller):
    return [torch.optim.SGD(distiller.parameters(), lr=0.1)]


def after_step(parts):
    distiller, teacher = toy_pair()
    batches = [ToyBatches().batch(part) for part in parts]
    outcome = train_step(distiller, teacher, sgd(distiller), batches, ALONE)
    return outcome, distiller.state_dict()


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 1, 2], [3, 4, 5]],
        [[0], [1, 2, 3, 4, 5]],
        [[0], [1], [2], [3], [4], [5]],
        [[0, 1, 2, 3], [4, 5], []],
        [[], [0, 1, 2, 3, 4, 5]],
    ],
)
def test_a_step_does_not_depend_on_its_micro_batches(parts):
    whole, expected = after_step([ROWS])
    outcome, state = after_step(parts)
    assert outcome.loss == pytest.approx(whole.loss, rel=1e-5)
    assert outcome.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert outcome.shares == pytest.approx(dict(whole.shares), rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


def test_a_step_is_the_mean_over_scored_tokens_of_the_plain_formula():
    distiller, teacher = toy_pair()
    batch = ToyBatches().batch(ROWS)
    loss, _ = distiller(batch, teacher.signal(batch), batch.num_scored())
    loss.backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in distiller.named_parameters()}
    outcome, state = after_step([ROWS])
    assert outcome.loss == pytest.approx(loss.item())
    weighted = (
        0.7 * 4 * outcome.shares["divergence"]
        + 0.3 * outcome.shares["cross_entropy"]
        + 0.5 * outcome.shares["hidden_state"]
    )
    unscaled = weighted - 0.7 * 3 * outcome.shares["divergence"]
    # Whether the logged divergence holds T^2 is the objective's business, not the step's.
    assert outcome.loss == pytest.approx(weighted, rel=1e-4) or outcome.loss == pytest.approx(
        unscaled, rel=1e-4
    )
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


def test_gradients_are_clipped_to_the_norm_over_all_parameters():
    reference, teacher = toy_pair()
    batch = ToyBatches().batch(ROWS)
    loss, _ = reference(batch, teacher.signal(batch), batch.num_scored())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    sgd(reference)[0].step()
    distiller, teacher = toy_pair()
    outcome = train_step(distiller, teacher, sgd(distiller), [batch], ALONE, max_grad_norm=0.01)
    assert outcome.grad_norm == pytest.approx(norm.item())
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(distiller.state_dict()[name], value)


def test_a_step_leaves_no_gradient_for_the_next():
    distiller, teacher = toy_pair()
    train_step(distiller, teacher, sgd(distiller), [ToyBatches().batch(ROWS)], ALONE)
    assert all(p.grad is None for p in distiller.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_loss_changes_no_weights(bad):
    distiller, teacher = toy_pair()
    with torch.no_grad():
        distiller.student.head.weight[0, 0] = bad
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    parts = [ToyBatches().batch([0, 1]), ToyBatches().batch([2])]
    outcome = train_step(distiller, teacher, sgd(distiller), parts, ALONE)
    assert not outcome.is_finite
    assert outcome.failed == (0, 1)
    for name, value in distiller.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32))


def test_a_nan_gradient_changes_no_weights():
    distiller, teacher = toy_pair()
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    next(distiller.parameters()).register_hook(lambda gradient: gradient * math.nan)
    outcome = train_step(distiller, teacher, sgd(distiller), [ToyBatches().batch(ROWS)], ALONE)
    assert not outcome.is_finite
    assert math.isfinite(outcome.loss)
    assert outcome.failed == ()
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_step_with_nothing_scored_has_no_gradient_and_a_loss_of_zero():
    distiller, teacher = toy_pair()
    empty = [ToyBatches().batch([])]
    step_tokens, stop, failed, writing = count_step(empty, [0] * len(SIGNALS), ALONE)
    assert step_tokens == 0
    assert stop is None
    assert not failed
    assert not writing
    accumulated = accumulate(distiller, teacher, empty, step_tokens, ALONE)
    assert accumulated.sums.tolist() == [0.0] * len(accumulated.sums)
    assert all(p.grad is None or not p.grad.any() for p in distiller.parameters())


def test_every_rank_gets_as_many_micro_batches():
    shares = [RowsOfStep(ToyBatches(), rows, most_rows=3) for rows in ([1, 2, 3], [4, 5], [6])]
    assert [len(share.cut(2)) for share in shares] == [2, 2, 2]
    assert shares[1].row_numbers(2) == [[4, 5], []]
    assert RowsOfStep(ToyBatches(), [], most_rows=0).row_numbers(4) == [[]]
