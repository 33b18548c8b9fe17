"""A mixture: its order is a function of seed and step, its weights are shares of the tokens."""

import itertools
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from limbeck.config import DataConfig
from limbeck.config.recipe import MixedConfig
from limbeck.data import SourceContext, TextData, data_problems, load_data, sources
from limbeck.data.mixture import in_run_order, passes
from limbeck.data.order import MixedOrder, Portion, turns
from limbeck.data.rows import stem
from limbeck.distributed import World
from limbeck.errors import ConfigError
from tests.data.data_files import load, write
from tests.tokenizers.small import CHATML, small

SHARES = st.lists(st.floats(1e-3, 1), min_size=1, max_size=5).map(
    lambda raw: np.array(raw) / sum(raw)
)
WORDS = "a still boils the wash and catches what rises as spirit vapour"


def text(number: int, length: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(WORDS.split()), number, number + length))


def mix(folder: Path, **weights: float) -> TextData:
    """`code` has 6 documents of 40 words, `chat` 30 of 5, `news` 12 of 20."""
    sizes = {"code": (6, 40), "chat": (30, 5), "news": (12, 20)}
    parts = []
    for name, weight in weights.items():
        rows = [{"text": text(i, sizes[name][1])} for i in range(sizes[name][0])]
        path = write(folder / f"{name}.jsonl", rows)
        parts.append(MixedConfig(path=str(path), weight=float(weight), type="text"))
    config = DataConfig(mix=tuple(parts), sequence_length=16)
    return load_data(config, small(), cache=folder / "c", max_positions=None)


def origin_of(data: TextData, document: int) -> str:
    """The source of a document: a text of the mixture, or the first folder below the path."""
    return stem(PurePosixPath(data.names[int(data.document_places[document, 0])]).parts[0])


def source_of(data: TextData, rows_per_step: int = 8, seed: int = 3):
    context = SourceContext(data, small(), seed, rows_per_step, 16)
    return sources.bind("shuffled", "data.source")(context)


def world(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"))


@example(shares=np.array([0.96, 0.01, 0.01, 0.01, 0.01]), begin=52, length=5)
@given(shares=SHARES, begin=st.integers(0, 3000), length=st.integers(0, 60))
def test_a_range_of_rows_equals_the_slice_of_the_whole_order(shares, begin, length) -> None:
    """What a step reads does not depend on the steps before it, which need not be replayed."""
    every, span = turns(0, begin + length, shares), turns(begin, begin + length, shares)
    for whole, part in zip(every, span, strict=True):
        assert part.tolist() == whole[begin:].tolist()
    sources, numbers = every
    for source in range(len(shares)):  # each source's rows come one by one, none left out
        mine = numbers[sources == source]
        assert mine.tolist() == list(range(len(mine)))


@given(shares=SHARES, end=st.integers(1, 2000))
def test_after_any_number_of_rows_shares_are_right_to_within_a_few_rows(shares, end) -> None:
    counts = np.bincount(turns(0, end, shares)[0], minlength=len(shares))
    assert (np.abs(counts - end * shares) <= 0.5 + shares * len(shares) / 2 + 1e-6).all()


def test_a_step_of_a_mixture_is_the_same_on_any_ranks_and_in_any_micro_batches(tmp_path) -> None:
    data = mix(tmp_path, code=3, chat=1)
    wanted = source_of(data)
    for size, micro_batch, step in itertools.product((1, 2, 4), (1, 3, 8), (0, 1, 7)):
        again = source_of(data)  # as after a resume: this step is the first it is asked for
        parts = [again.step(step, world(rank, size)) for rank in range(size)]
        read = [row for part in parts for batch in part.row_numbers(micro_batch) for row in batch]
        assert read == list(wanted.step(step, world(0, 1)).rows)
    assert len({tuple(wanted.step(step, world(0, 1)).rows) for step in range(8)}) == 8


def test_weights_are_shares_of_the_scored_tokens_to_within_a_few_rows(tmp_path) -> None:
    weights = {"code": 5.0, "chat": 2.0, "news": 1.0}
    data = mix(tmp_path, **weights)
    steps, length = 60, 16
    source = source_of(data)
    counts = dict.fromkeys(weights, 0)
    for step in range(steps):
        batch = data.batch(source.step(step, world(0, 1)).rows)
        for document in batch.documents().tolist():
            counts[origin_of(data, document)] += 1
    total = sum(counts.values())
    # half a row of a source's own, half of each other's, and the part of an epoch that is cut off
    for each in data.sources:
        wanted = total * weights[each.name] / sum(weights.values())
        row = each.num_scored / each.num_rows
        rows_off = 2 + each.num_rows / 2 * (1 - row / length)
        assert abs(counts[each.name] - wanted) <= rows_off * length, each.name


def test_a_source_that_ends_starts_again_in_another_order(tmp_path) -> None:
    data = mix(tmp_path, code=1, chat=1)
    order = MixedOrder(0, data.portions)
    small_one = data.sources[1]
    last = small_one.first_row + small_one.num_rows
    read = [r for r in order.rows(0, 4 * data.num_rows) if small_one.first_row <= r < last]
    first, second = read[: small_one.num_rows], read[small_one.num_rows : 2 * small_one.num_rows]
    assert sorted(first) == sorted(second) == list(range(small_one.first_row, last))
    assert first != second
    assert passes(data, 4 * data.num_rows)["chat"] == pytest.approx(
        len(read) / small_one.num_rows, abs=2 / small_one.num_rows
    )


def test_a_mixture_of_one_text_is_that_text(tmp_path) -> None:
    data = mix(tmp_path, code=7)
    alone = load(tmp_path / "code.jsonl")
    for name in ("tokens", "scored", "windows", "row_ends", "document_hashes"):
        assert vars(data)[name].tolist() == vars(alone)[name].tolist()
    for step in range(3):
        one, other = (source_of(d).step(step, world(0, 1)).rows for d in (data, alone))
        assert one == other
    assert source_of(data).fingerprint == source_of(alone).fingerprint


def test_documents_rows_and_windows_of_a_mixture_are_those_of_its_texts(tmp_path) -> None:
    data = mix(tmp_path, code=1, chat=1, news=1)
    seen = 0
    for source in data.sources:
        alone = load(tmp_path / f"{source.name}.jsonl")
        rows = range(source.first_row, source.first_row + source.num_rows)
        mine, theirs = data.batch(rows), alone.batch(range(alone.num_rows))
        assert mine.input_ids.equal(theirs.input_ids)
        assert mine.scored.equal(theirs.scored)
        first = seen
        seen += alone.num_documents
        assert (mine.document_ids[mine.document_ids >= 0] - first).equal(
            theirs.document_ids[theirs.document_ids >= 0]
        )
        assert {origin_of(data, d) for d in range(first, seen)} == {source.name}
        assert data.document_name(first) == f"{source.name}/{alone.document_name(0)}"
        assert (
            data.document_ends[first] - (data.document_ends[first - 1] if first else 0)
            == (alone.document_ends[0])
        )
    assert data.num_documents == seen
    for name in ("document_bytes", "document_scored", "document_hashes"):
        assert len(vars(data)[name]) == seen


def test_weights_do_not_tokenise_a_mixture_again_and_change_its_fingerprint(tmp_path) -> None:
    one = mix(tmp_path, code=1, chat=1)
    folders = sorted(p.name for p in (tmp_path / "c").iterdir())
    other = mix(tmp_path, code=1, chat=3)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == folders
    assert source_of(one).fingerprint != source_of(other).fingerprint
    assert one.facts["sources"].keys() == {"code", "chat"}


def test_a_changed_text_changes_the_facts_of_its_mixture(tmp_path) -> None:
    one = mix(tmp_path, code=1, chat=1).facts
    path = tmp_path / "chat.jsonl"
    tail = path.read_text().replace("boils", "rises", 1)
    data = DataConfig(
        mix=tuple(MixedConfig(path=str(tmp_path / f"{n}.jsonl")) for n in ("code", "chat")),
        sequence_length=16,
    )
    path.write_text(tail)
    other = load_data(data, small(), cache=tmp_path / "c", max_positions=None).facts
    assert one["sha256"] != other["sha256"]
    assert one["sources"]["code"]["sha256"] == other["sources"]["code"]["sha256"]


def test_texts_of_a_mixture_have_types_columns_and_limits_of_their_own(tmp_path) -> None:
    write(tmp_path / "a.jsonl", [{"body": text(i, 8), "w": 2.0} for i in range(4)])
    turns_of = [{"role": "user", "content": "boils?"}, {"role": "assistant", "content": "a still"}]
    write(tmp_path / "b.jsonl", [{"messages": turns_of}] * 5 + [{"messages": 3}])
    config = DataConfig(
        mix=(
            MixedConfig(path=str(tmp_path / "a.jsonl"), columns={"text": "body", "weight": "w"}),
            MixedConfig(
                path=str(tmp_path / "b.jsonl"), name="talk", bad_rows="skip", max_documents=6
            ),
        ),
        sequence_length=16,
    )
    tokenizer = small(template=CHATML)
    data = load_data(config, tokenizer, cache=tmp_path / "c", max_positions=None)
    assert data.types == ("text", "chat")
    assert [origin_of(data, d) for d in range(9)] == ["a"] * 4 + ["talk"] * 5
    assert data.document_weights.tolist() == [2.0] * 4 + [1.0] * 5
    assert data.facts["bad_rows"]["skipped"] == 1
    assert data.facts["bad_rows"]["first"][0].startswith("talk/b.jsonl:6: ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, r"data\.path: is missing, and a run needs it \(or data\.mix"),
        ({"path": "x", "mix": ({"path": "a"},)}, r"data\.path: belongs to each text of data\.mix"),
        (
            {"columns": {"text": "b"}, "mix": ({"path": "a"},)},
            r"data\.columns: belongs to each text",
        ),
        ({"mix": ({"weight": 2.0},)}, r"data\.mix\[0\]\.path: is missing"),
        (
            {"mix": ({"path": "a/x.jsonl"}, {"path": "b/x.parquet"})},
            r"data\.mix\[1\]\.name: must differ .* got 'x' twice",
        ),
        ({"mix": ({"path": "a", "name": "x/y"},)}, r"data\.mix\[0\]\.name: .* got 'x/y'"),
        ({"mix": ({"path": "a", "type": "chatt"},)}, r"data\.mix\[0\]\.type: .*'chat'"),
        (
            {"mix": ({"path": "a", "type": "text", "columns": {"txt": "b"}},)},
            r"data\.mix\[0\]\.columns\.txt: ",
        ),
    ],
)
def test_mistakes_in_a_mixture_are_named_by_their_place(options, told) -> None:
    parts = tuple(MixedConfig(**each) for each in options.pop("mix", ()))
    config = DataConfig(mix=parts, **options)
    found = [str(problem) for problem in data_problems(config)]
    assert any(re.match(told, problem) for problem in found), found


def test_layers_are_chosen_on_all_sources(tmp_path) -> None:
    data = mix(tmp_path, code=1, chat=1, news=1)
    first = in_run_order(data, 0)
    batch = first.batch(range(6))
    assert {origin_of(data, d) for d in batch.documents().tolist()} == {"code", "chat", "news"}
    assert first.num_rows <= data.num_rows
    assert first.row_length(0) == data.row_length(first.order[0])
    alone = load(tmp_path / "code.jsonl")
    assert in_run_order(alone, 0) is alone


def test_a_text_that_is_not_there_is_named_in_its_mixture(tmp_path) -> None:
    config = DataConfig(mix=(MixedConfig(path=str(tmp_path / "no.jsonl")),))
    with pytest.raises(ConfigError, match=r"no\.jsonl must exist, and does not"):
        load_data(config, small(), cache=tmp_path / "c", max_positions=None)


def test_portions_with_rows_of_unequal_length_are_read_completely() -> None:
    """Half the tokens each: rows half as long are read twice as often."""
    portions = [Portion(0, 10, 1 / 3), Portion(10, 20, 2 / 3)]
    rows = MixedOrder(0, portions).rows(0, 30)
    assert sorted(rows) == list(range(30))


def test_sources_of_a_mixture_are_those_of_its_columns_and_else_its_files(tmp_path) -> None:
    domains = {"a": ["code", "chat", "code"], "b": ["chat", "prose"]}
    for name, values in domains.items():
        rows = [{"text": text(i, 8), "domain": domain} for i, domain in enumerate(values)]
        write(tmp_path / f"{name}.jsonl", rows)
    write(tmp_path / "c.jsonl", [{"text": text(9, 8)}])
    columns = {"a": {"source": "domain"}, "b": {"source": "domain"}, "c": {}}
    parts = tuple(
        MixedConfig(path=str(tmp_path / f"{name}.jsonl"), columns=columns[name])
        for name in ("c", "a", "b")
    )
    config = DataConfig(mix=parts, sequence_length=16)
    data = load_data(config, small(), cache=tmp_path / "cache", max_positions=None)
    expected = ["c/c.jsonl", *domains["a"], *domains["b"]]
    assert [data.document_source(d) for d in range(6)] == expected
    assert data.document_sources.tolist() == [-1, 0, 1, 0, 1, 2]
