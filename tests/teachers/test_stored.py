"""A recorded teacher says what the online one says, as far as its form holds it."""

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

import limbeck
from limbeck.batch import Batch
from limbeck.errors import ConfigError, DataError
from limbeck.experiment import load
from limbeck.losses import SignalNeeds
from limbeck.losses.distributions import LazyLogits
from limbeck.losses.divergences import divergences
from limbeck.losses.divergences.kl import forward_kl
from limbeck.losses.terms.base import StudentView
from limbeck.store import Store
from limbeck.teachers import TeacherRequest, find_local, teachers
from limbeck.teachers.ahead import Ahead, samples_of
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.stored import StoredTeacher
from tests.experiment.recordings import from_store, record, recorded

CPU = torch.device("cpu")
BOTH = SignalNeeds(distribution=True, layers=frozenset({0, 3}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(autouse=True)
def _own_cache(folder, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def hidden(folder):
    """Parts of an online run, and its teacher recorded exactly, two layers too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder / "cache"))
        path = recorded(folder, {"type": "hidden"}, layers=(0, 1, 2, 3), data={"pack": False})
        with limbeck.assemble(load(path)) as run:
            parts = run.parts
    return parts, StoredTeacher(Store.open(folder / "store"), CPU)


def losses_and_gradients(parts, distiller, teacher, batch):
    distiller.zero_grad()
    signal = teacher.signal(batch)
    hidden, layers = distiller.student(batch, distiller.objective.student_layers)
    view = StudentView(hidden, distiller.student.head, layers, batch.targets())
    loss, shares = distiller.objective(view, signal, batch.num_scored())
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    return loss.detach(), shares, gradients


def objective_of(parts):
    objective = parts.config.objective
    extra = ({"type": "hidden_state", "weight": 0.1, "layer_map": "uniform"},)
    return replace(objective, extra=extra)


def test_exact_hidden_states_give_the_online_teachers_losses_and_gradients_bitwise(hidden):
    parts, stored = hidden
    online = LocalTeacher(parts.teacher.model)
    distiller = parts.distiller(parts.student.model, objective_of(parts))
    assert distiller.objective.needs.layers
    for teacher in (stored, online):
        teacher.require(TeacherRequest(needs=BOTH))
    # One row a micro-batch: the teacher read each window in a pass of its own, as here.
    for row in range(0, parts.data.num_rows, 7):
        batch = parts.data.batch([row])
        a = losses_and_gradients(parts, distiller, online, batch)
        b = losses_and_gradients(parts, distiller, stored, batch)
        assert torch.equal(a[0], b[0])
        assert a[1].keys() == b[1].keys()
        assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])
        assert a[2].keys() == b[2].keys()
        assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])
        layers = stored.signal(batch).layer_hidden, online.signal(batch).layer_hidden
        assert all(torch.equal(layers[0][i], layers[1][i]) for i in (0, 3))


def test_in_larger_micro_batches_they_agree_to_rounding(hidden):
    parts, stored = hidden
    batch = parts.data.batch([0, 5, 9, 2])
    mine, theirs = stored.signal(batch), LocalTeacher(parts.teacher.model).signal(batch)
    torch.testing.assert_close(mine.distribution.logits(), theirs.distribution.logits())


def test_packing_and_order_do_not_change_what_is_found(hidden, folder):
    parts, stored = hidden
    with limbeck.assemble(load(folder / "recipe.yaml", ["data.pack=true"])) as run:
        packed = run.parts.data
    assert packed.num_rows < parts.data.num_rows
    batch = packed.batch([3, 0, 1])
    mine, theirs = stored.signal(batch), LocalTeacher(parts.teacher.model).signal(batch)
    torch.testing.assert_close(mine.distribution.logits(), theirs.distribution.logits())


def test_a_batch_is_cut_into_the_windows_it_was_made_of():
    """A window and padding; then a piece with nothing scored, never recorded, and a window."""
    inputs = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 9, 1, 2, 3, 4]])
    targets = torch.tensor([[6, 7, 8, 9, 0, 0], [9, 9, 2, 3, 4, 5]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    scored = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()
    found = list(samples_of(Batch(inputs, targets, scored, positions, positions)))
    assert [each.tokens.tolist() for each in found] == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]
    assert [each.scored.tolist() for each in found] == [
        [False, True, True, True],
        [True, False, True, True],
    ]


def test_a_batch_without_rows_gets_an_empty_signal(hidden):
    parts, stored = hidden
    stored.require(TeacherRequest(needs=BOTH))
    signal = stored.signal(parts.data.batch([]))
    assert len(signal.distribution.rows(slice(None)).hidden) == 0
    assert signal.layer_hidden[3].shape == (0, 32)
    stored.require(TeacherRequest(needs=SignalNeeds()))
    assert stored.signal(parts.data.batch([0])).distribution is None


def test_prefetched_signals_are_the_same_and_are_read_once(hidden):
    parts, stored = hidden
    stored.require(TeacherRequest(needs=BOTH))
    batches = [parts.data.batch([0, 1]), parts.data.batch([2])]
    plain = [stored.signal(batch) for batch in batches]
    stored.prefetch(batches)
    stored.prefetch(batches)
    num_windows = sum(len(list(samples_of(batch))) for batch in batches)
    assert len(stored._ahead) == num_windows
    for batch, before in zip(batches, plain, strict=True):
        signal = stored.signal(batch)
        assert torch.equal(signal.distribution.hidden, before.distribution.hidden)
        assert torch.equal(signal.layer_hidden[3], before.layer_hidden[3])
    assert len(stored._ahead) == 0


def test_a_window_that_is_not_in_the_store_is_refused_when_it_is_read_and_not_before(hidden):
    parts, stored = hidden
    stored.require(TeacherRequest(needs=SignalNeeds(distribution=True)))
    batch = Batch.from_tokens(torch.randint(0, 9, (1, 12)))
    stored.prefetch([batch, parts.data.batch([0])])
    assert stored.signal(parts.data.batch([0])).distribution is not None
    with pytest.raises(DataError, match="has no sample"):
        stored.signal(batch)


def test_records_of_the_next_step_are_decoded_while_the_student_computes(folder, hidden):
    path = recorded(folder, {"type": "hidden"}, layers=(0, 1, 2, 3), data={"pack": False})
    waiting = []
    with limbeck.assemble(load(path, from_store(folder))) as run:
        teacher = run.parts.teacher
        before = type(teacher).signal

        def signal(self, batch):
            signal = before(self, batch)
            waiting.append(len(self._ahead))
            return signal

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(teacher), "signal", signal)
            run.train()
    assert max(waiting) > 0
    assert len(teacher._ahead) == 0


def test_only_so_many_positions_are_in_progress():
    started = []

    def start(sample):
        started.append(sample)
        future = Future()
        future.set_result(len(sample.tokens))
        return future

    ahead = Ahead(start, most_positions=20)
    batches = [Batch.from_tokens(torch.full((2, 11), token)) for token in range(3)]
    batches = [replace(b, input_ids=b.input_ids + torch.tensor([[0], [10]])) for b in batches]
    ahead.announce(batches)
    assert (len(started), len(ahead)) == (2, 6)
    assert [answer for _, answer in ahead.take(batches[0])] == [11, 11]
    assert (len(started), len(ahead)) == (4, 4)
    assert [answer for _, answer in ahead.take(batches[2])] == [11, 11]
    assert (len(started), len(ahead)) == (6, 2)


def test_one_changed_token_is_missing_and_not_misaligned(hidden):
    parts, stored = hidden
    stored.require(TeacherRequest(needs=SignalNeeds(distribution=True)))
    batch = parts.data.batch([0])
    tokens = torch.cat([batch.input_ids, batch.target_ids[:, -1:]], 1)
    tokens[0, 3] += 1
    with pytest.raises(DataError, match="has no sample"):
        stored.signal(Batch.from_tokens(tokens, batch.scored))
    less = batch.scored.clone()
    less[0, -1] = False
    with pytest.raises(DataError, match="which of its positions are scored"):
        stored.signal(
            Batch(batch.input_ids, batch.target_ids, less, batch.position_ids, batch.document_ids)
        )


def test_a_layer_that_was_not_recorded_is_refused(hidden):
    _, stored = hidden
    with pytest.raises(
        ConfigError, match=r"reads the teacher's layers \[4\].*holds layers \[0, 1, 2, 3"
    ):
        stored.require(TeacherRequest(needs=SignalNeeds(layers=frozenset({1, 4}))))
    with pytest.raises(ConfigError, match=r"queries, keys and values.*\[2\], and no store holds"):
        stored.require(TeacherRequest(needs=SignalNeeds(projections=frozenset({2}))))


def test_text_that_is_generated_during_the_run_is_refused(hidden):
    _, stored = hidden
    with pytest.raises(ConfigError, match=r"generated during the run .* recorded text only"):
        stored.require(TeacherRequest(generated=True))


def student_logits(parts, batch):
    with torch.no_grad():
        hidden, _ = parts.student.model(batch)
    return parts.student.model.head(hidden)


F_DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_top_k_store_is_never_above_the_dense_teacher(hidden, tmp_path, temperature):
    parts, exact = hidden
    recorded(tmp_path, {"type": "top_k", "k": 16, "temperatures": [1.0, 2.0]}, data={"pack": False})
    exact.require(TeacherRequest(needs=SignalNeeds(distribution=True)))
    kept = StoredTeacher(Store.open(tmp_path / "store"), CPU)
    batch = parts.data.batch(list(range(8)))
    logits = student_logits(parts, batch)
    for name in F_DIVERGENCES:
        divergence = divergences.bind(name, "divergence")
        dense = exact.signal(batch).distribution.compare(logits, temperature)
        merged = kept.signal(batch).distribution.compare(logits, temperature)
        # Of the mean, with room for the stored levels' own rounding.
        low = divergence(merged.student, merged.teacher).mean()
        high = divergence(dense.student, dense.teacher).mean()
        assert low <= high * 1.002, name
        assert low > 0, name


def test_states_recorded_in_float16_are_multiplied_in_the_format_of_the_head(tmp_path):
    """They came from bfloat16, which float16 rounds only where it has no room."""
    teacher = {"type": "online", "path": str(tmp_path / "teacher"), "dtype": "bfloat16"}
    form = {"type": "hidden", "precision": "float16"}
    with limbeck.assemble(load(recorded(tmp_path, form, teacher=teacher))) as run:
        batch = run.parts.data.batch([0, 1])
    store = Store.open(tmp_path / "store")
    read = StoredTeacher(store, CPU).signal(batch).distribution
    assert read.hidden.dtype == read.head.weight.dtype == torch.bfloat16
    kept = store.distribution([sample.key for sample in samples_of(batch)]).hidden
    assert kept.dtype == torch.float16
    assert torch.equal(read.hidden.half(), kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw", ["systematic", pytest.param("multinomial", marks=pytest.mark.long)]
)
def test_samples_from_a_store_are_unbiased_in_value_and_gradient(hidden, tmp_path, draw):
    """Every seed is another recording; their mean is the dense teacher within 4 sigma."""
    parts, exact = hidden
    exact.require(TeacherRequest(needs=SignalNeeds(distribution=True)))
    batch = parts.data.batch([0, 4])
    logits = student_logits(parts, batch).requires_grad_()
    pair = exact.signal(batch).distribution.compare(logits, 2.0)
    dense = forward_kl(pair.student, pair.teacher).sum()
    (dense_gradient,) = torch.autograd.grad(dense, logits)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    values, slopes = [], []
    form = {"type": "samples", "num_draws": 8, "temperature": 2.0, "draw": draw}
    path = recorded(tmp_path, form, data={"pack": False, "max_documents": 6})
    for seed in range(24):
        store = tmp_path / f"store-{seed}"
        more = [f"seed={seed}", f"record.output={store}", "evaluate.data=null"]
        record(load(path, more))
        distribution = StoredTeacher(Store.open(store), CPU).signal(batch).distribution
        pair = distribution.compare(logits, 2.0)
        value = (forward_kl(pair.student, pair.teacher) + distribution.correction()).sum()
        (gradient,) = torch.autograd.grad(value, logits)
        values.append(float(value.detach()))
        slopes.append(float((gradient * direction).sum()))
    wanted = float(dense.detach()), float((dense_gradient * direction).sum())
    for found, expected in zip((values, slopes), wanted, strict=True):
        error = np.std(found, ddof=1) / len(found) ** 0.5
        assert abs(np.mean(found) - expected) < 4 * error
        assert error > 0


def test_the_facts_name_the_model_and_what_was_kept_of_it(hidden):
    parts, stored = hidden
    facts = stored.info.to_json()
    told = facts.pop("recorded")
    assert facts == parts.teacher.info.to_json()
    assert told["form"] == {"type": "hidden", "precision": "exact"}
    assert find_local(stored) is None
    assert "stored" in teachers.names()
    assert isinstance(stored.signal(parts.data.batch([0])).distribution, LazyLogits)
