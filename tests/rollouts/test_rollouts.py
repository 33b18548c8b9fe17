"""Text the student writes: drawn exactly, scored exactly, the same again after a resume."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch

from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig
from limbeck.config.trainable import LowRankConfig, TrainableConfig
from limbeck.distributed import World
from limbeck.errors import ConfigError, DataError
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.losses.divergences import divergences
from limbeck.models import Distiller, make_trainable
from limbeck.rollouts import Rollout, Rollouts, Sampling, Scoring, rollout_batch, sample, seed_of
from limbeck.rollouts.sampling import OPEN, nucleus
from limbeck.teachers import LocalTeacher
from limbeck.train import train, train_step
from tests.models.tiny import tiny_llama
from tests.train.toy import ALONE, VOCABULARY, Listener, fingerprint, toy_pair, toy_setup

PROMPTS = [[5], [3, 9, 1, 7], [2, 2], [30, 11, 4], [8, 1, 6, 6, 20]]
DIVERGENCE = ObjectiveConfig(alpha=1.0, divergence="reverse_kl")


def model(end=None):
    made = tiny_llama(2, 16, VOCABULARY, seed=1)
    made.hf_model.generation_config.eos_token_id = end
    return made


def seeds(count):
    return [seed_of((7, 0, place)) for place in range(count)]


def rollouts_of(student, folder, rows_per_step=3, tokens=4, **more):
    sampling, size = Sampling(tokens=tokens), {"rows_per_step": rows_per_step, **more}
    return Rollouts(student, PROMPTS, sampling, seed=11, folder=folder, **size)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_a_row_is_the_same_alone_and_beside_longer_prompts(top_p):
    student, sampling = model(), Sampling(tokens=6, top_p=top_p, sampling_temperature=0.7)
    together = sample(student, PROMPTS, sampling, seeds(5))
    for prompt, seed, row in zip(PROMPTS, seeds(5), together, strict=True):
        (alone,) = sample(student, [prompt], sampling, [seed])
        assert alone.token_ids == row.token_ids
        assert alone.logprobs == pytest.approx(row.logprobs, abs=1e-5)


def adapted():
    made = model()
    make_trainable(made, TrainableConfig(lora=LowRankConfig(rank=4)), seed=0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    return made


@pytest.mark.parametrize("make", [model, adapted])
def test_logprobs_are_those_of_one_pass_over_the_finished_text(make):
    student = make()
    for row in sample(student, PROMPTS, Sampling(tokens=6, sampling_temperature=2.0), seeds(5)):
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        logprobs = student.logits(ids).log_softmax(-1)[0, len(row.prompt_ids) - 1 : -1]
        expected = logprobs.gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0]
        assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_draws_follow_the_tempered_distribution_within_four_sigma():
    student, count = model(), 4000
    rows = sample(
        student, [[5]] * count, Sampling(tokens=1, sampling_temperature=0.5), seeds(count)
    )
    p = (student.logits(torch.tensor([[5]]))[0, -1] / 0.5).softmax(-1)
    drawn = torch.tensor([row.token_ids[0] for row in rows]).bincount(minlength=VOCABULARY)
    assert ((drawn - count * p).abs() <= 4 * (count * p * (1 - p)).sqrt() + 1).all()


def test_a_rollout_ends_with_its_first_end_token_and_says_so():
    rows = sample(model(end=[4, 9, 17, 21, 30]), [[5]] * 40, Sampling(tokens=5), seeds(40))
    ends = {4, 9, 17, 21, 30}
    assert {row.finish for row in rows} == {"end", "length"}
    for row in rows:
        assert not ends & set(row.token_ids[:-1])
        assert (row.token_ids[-1] in ends) == (row.finish == "end")
        assert row.finish == "end" or len(row.token_ids) == 5
        assert len(row.logprobs) == len(row.token_ids)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_keeps_the_mode_and_the_global_random_state(training):
    student, state = model().train(training), torch.get_rng_state()
    sample(student, PROMPTS, Sampling(tokens=2), seeds(5))
    assert student.training is training
    assert torch.equal(torch.get_rng_state(), state)


def test_only_written_tokens_are_scored_from_the_first_to_the_last():
    rows = [
        Rollout((5,), (1, 2, 3), (0.0,) * 3, "end"),
        Rollout((6, 7, 8), (9,), (0.0,), "length"),
    ]
    batch = rollout_batch(rows, first_document=3)
    assert batch.targets().tolist() == [1, 2, 3, 9]
    assert batch.input_ids[batch.scored].tolist() == [5, 1, 2, 8]
    assert batch.documents().tolist() == [3, 3, 3, 4]
    assert rollout_batch([]).num_scored() == 0


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ((0.0, 1.0), [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12], [13]]),
        ((0.0, 0.3), [[1, 2, 3], [11], [13]]),
        ((0.3, 0.7), [[4, 5, 6, 7], [12], [13]]),
        ((0.7, 1.0), [[8, 9, 10], [12], [13]]),
    ],
)
def test_a_part_of_each_rollout_is_scored_from_its_first_to_its_last_token(part, expected):
    """The parts of ten tokens are disjoint and together the whole; each part has a token."""
    texts = [tuple(range(1, 11)), (11, 12), (13,)]
    rows = [Rollout((5,) * 3, text, (0.0,) * len(text), "end") for text in texts]
    batch = rollout_batch(rows, 0, Scoring(*part))
    assert batch.targets().tolist() == [token for text in expected for token in text]
    assert torch.equal(batch.input_ids, rollout_batch(rows).input_ids)


def test_the_scored_part_is_in_the_step_and_in_what_a_checkpoint_compares(tmp_path):
    whole, first = (
        rollouts_of(model(), tmp_path),
        rollouts_of(model(), tmp_path, scoring=Scoring(0.0, 0.5)),
    )
    (batch,) = first.step(0, ALONE).cut(3)
    assert batch.num_scored() == 6
    assert whole.step(0, ALONE).cut(3)[0].num_scored() == 12
    assert first.latest == whole.latest
    assert first.fingerprint != whole.fingerprint


@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_ranks_write_the_rollouts_of_one(size, tmp_path):
    source = rollouts_of(model(), tmp_path)
    whole = [row.token_ids for row in source.write(2, ALONE)]
    device = torch.device("cpu")
    parts = [source.write(2, World(rank, size, device)) for rank in range(size)]
    assert [row.token_ids for part in parts for row in part] == whole


def test_several_rollouts_of_a_prompt_are_different_and_in_one_step(tmp_path):
    once = rollouts_of(model(), tmp_path, rows_per_step=2)
    twice = rollouts_of(model(), tmp_path, rows_per_step=4, per_prompt=2)
    for step in range(4):
        prompts = [row.prompt_ids for row in once.write(step, ALONE)]
        rows = twice.write(step, ALONE)
        assert [row.prompt_ids for row in rows] == [p for p in prompts for _ in range(2)]
        parts = [twice.write(step, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
        assert [row.token_ids for part in parts for row in part] == [r.token_ids for r in rows]
        assert len({row.token_ids for row in rows}) == 4
    assert once.fingerprint != twice.fingerprint


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(tmp_path):
    distiller, _ = toy_pair(DIVERGENCE)
    teacher = LocalTeacher(tiny_llama(2, 16, VOCABULARY, seed=1), distiller.objective.needs)
    batches = rollouts_of(distiller.student, tmp_path).step(0, ALONE).cut(2)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.0)
    outcome = train_step(distiller, teacher, [optimizer], batches, ALONE, max_grad_norm=1.0)
    assert outcome.loss == pytest.approx(0, abs=1e-6)
    assert outcome.grad_norm == pytest.approx(0, abs=1e-6)


def small_pair(config):
    """A student, its teacher and an objective, of 5 tokens."""
    objective = build_objective(
        config, PairShapes(2, 2, 16, 16, LayerMap.uniform(2, 2)), head_budget_mb=1
    )
    distiller = Distiller(tiny_llama(2, 16, 5, seed=1), objective)
    return distiller, LocalTeacher(tiny_llama(2, 16, 5, seed=2), objective.needs)


def step_gradients(distiller, teacher, batches):
    """The gradient of one step, in the order of the parameters; the weights stay as they are."""
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1.0)
    train_step(distiller, teacher, [optimizer], batches, ALONE, max_grad_norm=1e9)
    moved = [before[name] - weight.detach() for name, weight in distiller.named_parameters()]
    distiller.load_state_dict(before)
    return moved


def enumerated(student, teacher, divergence, decay=1.0):
    """The exact expectation over all continuations of 3 tokens, and its gradient.

    Each prefix counts with its probability, which is not differentiated.
    """
    function, reference = divergences.bind(divergence, "divergence"), torch.zeros(())
    for length in range(3):
        for prefix in itertools.product(range(5), repeat=length):
            ids = torch.tensor([[1, *prefix]])
            q = student.logits(ids).log_softmax(-1)[0]
            p = teacher.logits(ids).log_softmax(-1)[0].detach()
            chance = sum((q[i, token] for i, token in enumerate(prefix)), torch.zeros(())).exp()
            value = function(q[-1:], p[-1:])[0]
            reference = reference + decay**length * chance.detach() * value
    return torch.autograd.grad(reference, list(student.parameters()))


def everything(student, decay=1.0):
    """Every continuation of 3 of 5 tokens, each weighted by its probability."""
    rows = [Rollout((1,), y, (0.0,) * 3, "length") for y in itertools.product(range(5), repeat=3)]
    batch = rollout_batch(rows, 0, Scoring(decay=decay))
    logprobs = student.logits(batch.input_ids).log_softmax(-1).detach()
    chance = logprobs.gather(-1, batch.target_ids[..., None])[..., 0].sum(-1).exp()
    own = torch.ones_like(logprobs[..., 0]) if batch.weights is None else batch.weights
    return replace(batch, weights=chance[:, None] * own)


SAMPLED = ObjectiveConfig(
    alpha=1.0, divergence=None, extra=({"type": "sampled_reverse_kl", "weight": 1.0},)
)


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize(
    "divergence",
    [
        "sampled",
        "reverse_kl",
        "forward_kl",
        {"type": "jensen_shannon", "beta": 0.3},
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
    ],
    ids=lambda spec: spec if isinstance(spec, str) else spec["type"],
)
def test_the_expected_gradient_is_that_of_all_continuations_enumerated(divergence, decay):
    is_sampled = divergence == "sampled"
    config = SAMPLED if is_sampled else replace(SAMPLED, divergence=divergence, extra=())
    distiller, teacher = small_pair(config)
    exact = "reverse_kl" if is_sampled else divergence
    expected = enumerated(distiller.student, teacher.model, exact, decay)
    found = step_gradients(distiller, teacher, [everything(distiller.student, decay)])
    for moved, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(moved * 375, gradient, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("config", [SAMPLED, DIVERGENCE], ids=["sampled", "exact"])
def test_the_gradient_of_drawn_texts_is_unbiased_within_four_sigma(config):
    """Forty steps of 200 drawn texts each, along a fixed direction in the space of weights."""
    distiller, teacher = small_pair(config)
    expected = enumerated(distiller.student, teacher.model, "reverse_kl")
    torch.manual_seed(0)
    direction = [torch.randn_like(gradient) for gradient in expected]
    along = []
    for step in range(40):
        drawn = sample(
            distiller.student,
            [[1]] * 200,
            Sampling(tokens=3),
            [seed_of((step, row)) for row in range(200)],
        )
        found = step_gradients(distiller, teacher, [rollout_batch(drawn)])
        along.append(sum(float((a * 3 * b).sum()) for a, b in zip(found, direction, strict=True)))
    wanted = sum(float((a * b).sum()) for a, b in zip(expected, direction, strict=True))
    mean, error = torch.tensor(along).mean(), torch.tensor(along).std() / 40**0.5
    assert abs(mean - wanted) < 4 * error
    assert error < 0.25 * abs(wanted)  # else the test could not fail


def test_a_mixed_step_has_the_gradients_of_both_parts_by_their_tokens(tmp_path):
    """GKD's lambda: scored tokens of rollouts and of fixed text count alike."""
    distiller, teacher = small_pair(DIVERGENCE)
    drawn = sample(distiller.student, [[1]] * 3, Sampling(tokens=3), seeds(3))
    written = rollout_batch(drawn)
    fixed = Batch.from_tokens(torch.tensor([[2, 1, 4, 0, 3, 1, 2]]))
    apart = [step_gradients(distiller, teacher, [each]) for each in (written, fixed)]
    tokens = [int(each.num_scored()) for each in (written, fixed)]
    both = step_gradients(distiller, teacher, [written, fixed])
    for a, b, whole in zip(*apart, both, strict=True):
        mean = (tokens[0] * a + tokens[1] * b) / sum(tokens)
        torch.testing.assert_close(whole, mean, atol=1e-6, rtol=1e-4)


def test_a_tokens_weight_decays_from_the_first_that_is_scored():
    rows = [Rollout((5, 6), tuple(range(1, 11)), (0.0,) * 10, "end")]
    batch = rollout_batch(rows, 0, Scoring(0.5, 1.0, 0.5))
    assert batch.targets().tolist() == [6, 7, 8, 9, 10]
    assert batch.token_weights().tolist() == [1, 0.5, 0.25, 0.125, 0.0625]
    assert rollout_batch(rows).token_weights() is None
    text = Rollout((5,), (1,) * 2000, (0.0,) * 2000, "length")
    endless = rollout_batch([text], 0, Scoring(decay=0.5))
    assert endless.num_scored() == 2000


def kept(folder, step):
    lines = (folder / f"step-{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def moved(student, by=0.5):
    """The student after an update."""
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1 + by)


def test_a_block_is_written_with_the_weights_of_its_first_step_and_the_draws_of_each(tmp_path):
    """Blocks 0 to 3 and 4 to 5, which the run's end cuts; the weights change after each step."""
    student, fixed = model(), model()
    source = rollouts_of(student, tmp_path / "block", refresh=4, num_steps=6)
    for step, block in enumerate([0, 0, 0, 0, 4, 4]):
        if step == block:
            fixed.load_state_dict(student.state_dict())
        metrics = source.step(step, ALONE).metrics
        assert len(list((tmp_path / "block").iterdir())) == (6 if block else 4)
        assert metrics["rollout_staleness"] == step - block
        assert (metrics["rollout_seconds"] > 0) == (step == block)
        expected = rollouts_of(fixed, tmp_path / "each").write(step, ALONE)
        rows = kept(tmp_path / "block", step)
        assert [row.token_ids for row in source.latest] == [row.token_ids for row in expected]
        for row, own, other in zip(rows, source.latest, expected, strict=True):
            assert row["token_ids"] == list(own.token_ids)
            assert row["logprobs"] == list(own.logprobs)
            assert own.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert row.get("weights_step", step) == block
        moved(student)
    assert source.fingerprint != rollouts_of(student, tmp_path).fingerprint


def test_without_refresh_a_step_is_written_as_it_was_and_nothing_is_read(tmp_path):
    student = model()
    source = rollouts_of(student, tmp_path)
    for step in (0, 1, 1):
        expected = source.write(step, ALONE)
        assert source.step(step, ALONE).metrics["rollout_staleness"] == 0
        assert source.latest == expected
        lines = "".join(json.dumps(asdict(rollout)) + "\n" for rollout in expected)
        assert (tmp_path / f"step-{step}.jsonl").read_text() == lines
        moved(student)


def test_a_longer_run_writes_the_rest_of_a_block_that_its_first_end_had_cut(tmp_path):
    student = model()
    rollouts_of(student, tmp_path, refresh=4, num_steps=2).step(0, ALONE)
    moved(student)
    longer = rollouts_of(student, tmp_path, refresh=4, num_steps=5)
    found = {step: longer.step(step, ALONE).metrics["rollout_staleness"] for step in (1, 2, 3)}
    assert found == {1: 1, 2: 0, 3: 1}
    again = rollouts_of(student, tmp_path, refresh=4, num_steps=5)
    assert again.step(3, ALONE).metrics["rollout_staleness"] == 1
    expected = rollouts_of(student, tmp_path / "now").write(3, ALONE)
    assert [row.token_ids for row in again.latest] == [row.token_ids for row in expected]


def test_a_kept_file_that_is_damaged_is_named(tmp_path):
    source = rollouts_of(model(), tmp_path, refresh=2)
    source.step(0, ALONE)
    (tmp_path / "step-1.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"step-1\.jsonl must hold a rollout in each line"):
        source.step(1, ALONE)


@pytest.mark.parametrize(("lost", "named"), [([2], 2), ([3], 3), ([1, 2], 1), ([0, 1, 2, 3], 1)])
def test_a_kept_file_that_is_missing_is_named_and_nothing_is_written_again(lost, named, tmp_path):
    student = model()
    rollouts_of(student, tmp_path, refresh=4).step(0, ALONE)
    moved(student)
    for step in lost:
        (tmp_path / f"step-{step}.jsonl").unlink()
    left = sorted(tmp_path.iterdir())
    again = rollouts_of(student, tmp_path, refresh=4)
    named = 0 if 0 in lost else named
    with pytest.raises(DataError, match=rf"step-{named}\.jsonl must hold .*--resume-from.*step 0"):
        list(map(again.step, (1, 2, 3), [ALONE] * 3))
    assert sorted(tmp_path.iterdir()) == left


def test_a_written_batch_is_read_again_if_it_is_whole_and_else_written_whole(tmp_path):
    """With a writer, which need not write the same text twice."""
    student, batches = model(), []

    def write(prompts, seeds, world):
        batches.append(len(prompts))
        return sample(student, prompts, Sampling(tokens=4), seeds)

    options = {"refresh": 2, "num_steps": 4, "writer": write}
    first = rollouts_of(student, tmp_path, **options)
    first.step(0, ALONE)
    wanted = [row.token_ids for row in first.latest]
    moved(student)
    again = rollouts_of(student, tmp_path, **options)
    again.step(0, ALONE)
    assert [row.token_ids for row in again.latest] == wanted
    assert batches == [6]
    (tmp_path / "step-1.jsonl").unlink()
    for step in (0, 1):
        again.step(step, ALONE)
    assert batches == [6, 6]
    assert kept(tmp_path, 1)[0]["weights_step"] == 0


@pytest.mark.parametrize("refresh", [1, 3, 5])
def test_a_resumed_run_reads_and_learns_the_same(refresh, tmp_path):
    """Resumed at step 8: the start of a block, its last step, and within one."""

    class KilledError(Exception):
        pass

    def kill(record):
        if record.get("step") == 10 and record["kind"] == "step":
            raise KilledError

    def setup(folder, **changes):
        pair = toy_pair(DIVERGENCE)
        made = toy_setup(folder, pair=pair, optim={"steps": 12}, **changes)
        source = rollouts_of(pair[0].student, folder / "rollouts", refresh=refresh, num_steps=12)
        return replace(made, source=source)

    train(setup(tmp_path / "whole"))
    with pytest.raises(KilledError):
        train(setup(tmp_path / "cut", sinks=[Listener(kill)]))
    train(setup(tmp_path / "cut", resume=True))
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    files = sorted((tmp_path / "whole" / "rollouts").iterdir())
    assert len(files) == 12
    for file in files:
        lines = file.read_text()
        keys = {"prompt_ids", "token_ids", "logprobs", "finish"}
        stale = int(file.stem.removeprefix("step-")) % refresh > 0
        expected = keys | ({"weights_step"} if stale else set())
        expected |= {"block_end"} if refresh > 1 else set()
        assert [set(json.loads(line)) for line in lines.splitlines()] == [expected] * 3
        assert (tmp_path / "cut" / "rollouts" / file.name).read_text() == lines


def test_prompts_that_cannot_be_continued_are_refused(tmp_path):
    student = model()
    with pytest.raises(DataError, match="1 of them empty"):
        Rollouts(student, [[1], []], Sampling(), seed=0, rows_per_step=1, folder=tmp_path)
    assert student.max_positions is not None
    with pytest.raises(ConfigError, match=r"rollout\.tokens"):
        rollouts_of(student, tmp_path, tokens=student.max_positions)


def test_an_epoch_takes_every_prompt_once_and_later_steps_draw_anew(tmp_path):
    source = rollouts_of(model(), tmp_path, rows_per_step=1)
    steps = [source.write(step, ALONE)[0] for step in range(10)]
    for epoch in (steps[:5], steps[5:]):
        assert sorted(row.prompt_ids for row in epoch) == sorted(map(tuple, PROMPTS))
    texts = {prompt: [r.token_ids for r in steps if r.prompt_ids == prompt] for prompt in [(5,)]}
    assert texts[(5,)][0] != texts[(5,)][1]


def test_the_noise_of_a_draw_is_finite_at_both_ends():
    """Infinite noise would draw its token for certain, or no token that top_p kept."""
    low, high = OPEN
    uniform = torch.tensor([0.0, 1 - 2.0**-24]) * (high - low) + low
    assert (uniform > 0).all()
    assert (uniform < 1).all()
    assert (-torch.log1p(-uniform)).log().isfinite().all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.45, 2), (0.75, 3), (0.95, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logprobs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert nucleus(logprobs, top_p).isfinite()[0].tolist() == [
        place in (1, 3, 2, 0)[:kept] for place in range(4)
    ]
