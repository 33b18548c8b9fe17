"""Batches from packed rows, and the cache they are mapped from."""

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.config import ReadConfig
from limbeck.data import TextData, corpus_path, overlap
from limbeck.data.build import Draft
from limbeck.data.rows import open_source
from limbeck.errors import ConfigError, TryLaterError
from tests.data.data_files import load, write
from tests.tokenizers.small import SENTENCES, small

TOKENIZER = small()
ROWS = [{"text": sentence} for sentence in SENTENCES]


def targets_of(data: TextData) -> dict[int, list[int]]:
    """Each document's scored targets, in the order of their positions in it."""
    found: dict[int, dict[int, list[int]]] = {}
    firsts = data.windows[:, 0]
    for row in range(data.num_rows):
        begin = int(data.row_ends[row - 1]) if row else 0
        windows = data.row_windows[begin : data.row_ends[row]]
        batch, at = data.batch([row]), 0
        for window in windows:
            length, document = data.windows[window, 1:].tolist()
            place = slice(at, at + length)
            assert set(batch.document_ids[0, place].tolist()) == {document}
            assert batch.position_ids[0, place].tolist() == list(range(length))
            scored = batch.scored[0, place]
            found.setdefault(document, {})[int(firsts[window])] = batch.target_ids[0, place][
                scored
            ].tolist()
            at += length
    return {d: [t for _, part in sorted(parts.items()) for t in part] for d, parts in found.items()}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text("ab cdé\n", min_size=1, max_size=60).filter(str.strip), min_size=1),
    length=st.integers(2, 20),
    packed=st.booleans(),
)
def test_every_token_is_a_target_once_and_documents_share_no_position(
    tmp_path: Path, texts: list[str], length: int, packed: bool
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    data = load(path, TOKENIZER, sequence_length=length, pack=packed)
    wanted = [[*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id][1:] for text in texts]
    found = targets_of(data)
    assert [found[index] for index in range(len(texts))] == wanted
    assert all(data.row_length(row) <= length for row in range(data.num_rows))
    assert data.num_scored == sum(map(len, wanted))
    batch = data.batch(range(data.num_rows))
    assert int(batch.num_scored()) == data.num_scored
    assert torch.equal(batch.scored, batch.document_ids >= 0)


def test_without_packing_each_row_is_one_segment_padded_to_the_longest(
    tmp_path: Path,
) -> None:
    data = load(write(tmp_path / "r.jsonl", ROWS), TOKENIZER, pack=False, sequence_length=512)
    assert data.num_rows == 5
    lengths = [data.row_length(row) for row in range(5)]
    batch = data.batch([0, 4, 2])
    assert batch.input_ids.shape == (3, max(lengths[0], lengths[4], lengths[2]))
    assert (batch.document_ids >= 0).sum(1).tolist() == [lengths[0], lengths[4], lengths[2]]


def test_padding_is_a_separate_segment_and_never_scored(tmp_path: Path) -> None:
    data = load(write(tmp_path / "r.jsonl", ROWS), TOKENIZER, pack=False, sequence_length=512)
    lengths = [data.row_length(row) for row in range(5)]
    row = int(np.argmin(lengths))
    batch = data.batch([row, int(np.argmax(lengths))])
    padding = slice(lengths[row], None)
    assert batch.position_ids[0, padding].tolist() == list(range(max(lengths) - lengths[row]))
    assert not batch.scored[0, padding].any()
    assert set(batch.document_ids[0, padding].tolist()) == {-1}


def test_no_rows_give_one_row_with_nothing_scored(tmp_path: Path) -> None:
    batch = load(write(tmp_path / "r.jsonl", ROWS)).batch([])
    assert batch.input_ids.shape[0] == 1
    assert int(batch.num_scored()) == 0
    assert set(batch.document_ids.flatten().tolist()) == {-1}


def test_document_bytes_are_those_of_all_but_the_first_token(tmp_path: Path) -> None:
    data = load(write(tmp_path / "r.jsonl", ROWS), TOKENIZER)
    first = [len(TOKENIZER.decode(TOKENIZER(s).input_ids[:1])) for s in SENTENCES]
    wanted = [len(s.encode()) - n for s, n in zip(SENTENCES, first, strict=True)]
    assert data.document_bytes.tolist() == wanted


def test_facts_are_json_and_count_what_is_there(tmp_path: Path) -> None:
    data = load(write(tmp_path / "r.jsonl", [*ROWS, ROWS[0]]))
    facts = json.loads(json.dumps(dict(data.facts)))
    assert facts["documents"] == 6
    assert facts["duplicates"] == 1
    assert facts["rows"] == data.num_rows
    assert facts["scored"] == data.num_scored == int(data.batch(range(data.num_rows)).num_scored())
    assert facts["positions"] == sum(map(data.row_length, range(data.num_rows)))
    assert facts["packing_efficiency"] == facts["positions"] / (16 * data.num_rows)
    assert facts["largest_token_id"] == int(data.tokens.max())
    assert len(facts["sha256"]) == len(facts["tokenizer"]) == len(facts["template"]) == 64


def test_overlap_counts_held_out_documents_that_are_trained_on(tmp_path: Path) -> None:
    train = load(write(tmp_path / "a.jsonl", ROWS[:3]))
    held_out = load(write(tmp_path / "b.jsonl", [ROWS[4], ROWS[1], ROWS[2]]))
    assert overlap(train, held_out) == 2
    assert overlap(train, load(write(tmp_path / "c.jsonl", ROWS[3:]))) == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most", [1, 40, 100, 150, 300, 10_000])
def test_token_rows_are_always_the_same_and_hold_about_what_is_asked(
    tmp_path: Path, packed: bool, most: int
) -> None:
    rows = [{"text": f"{sentence} {n}"} for n in range(5) for sentence in SENTENCES]
    data = load(write(tmp_path / "r.jsonl", rows), pack=packed)
    chosen = data.token_rows(most)
    assert chosen == sorted(set(chosen)) == data.token_rows(most)
    held = sum(map(data.row_length, chosen))
    assert held <= most or len(chosen) == 1
    if most == 10_000:
        assert chosen == list(range(data.num_rows))
    if len(chosen) > 1:
        assert held > most - 2 * 16 or len(chosen) == data.num_rows


def test_token_rows_reach_every_document_before_any_twice(tmp_path: Path) -> None:
    rows = [{"text": SENTENCES[n % 5] * (1 + n)} for n in range(8)]
    data = load(write(tmp_path / "r.jsonl", rows), pack=False)
    one_each = data.token_rows(8 * 16)
    assert sorted({int(d) for d in data.windows[one_each, 2]}) == list(range(8))
    assert len(one_each) == 8
    longest = [row for row in range(data.num_rows) if data.windows[row, 2] == 7]
    many = set(data.token_rows(data.facts["positions"] * 2 // 3)) & set(longest)
    gaps = np.diff(sorted(many))
    assert max(gaps) <= 4
    assert min(many) - longest[0] <= 4
    assert longest[-1] - max(many) <= 4


def test_token_rows_of_chosen_documents_reach_all_of_them(tmp_path: Path) -> None:
    rows = [{"text": SENTENCES[n % 5] * (1 + n)} for n in range(8)]
    data = load(write(tmp_path / "r.jsonl", rows), pack=False)
    some = np.array([1, 4, 7])
    for most in (1, 3 * 16, 10_000):
        chosen = data.token_rows(most, some)
        assert set(data.row_documents[chosen]) <= {1, 4, 7}
        assert len(chosen) == 1 or set(data.row_documents[chosen]) == {1, 4, 7}
    assert chosen == np.flatnonzero(np.isin(data.row_documents, some)).tolist()


def test_a_documents_scored_tokens_are_those_of_its_rows(tmp_path: Path) -> None:
    data = load(write(tmp_path / "r.jsonl", ROWS), sequence_length=8)
    documents = data.batch(range(data.num_rows)).documents().numpy()
    counts = np.bincount(documents, minlength=data.num_documents)
    assert data.document_scored.tolist() == counts.tolist()


def test_a_tilde_in_a_path_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # the cache of this test lies beside the path it is given
    write(tmp_path / "r.jsonl", ROWS)
    assert load(Path("~/r.jsonl")).num_documents == len(ROWS)


def arrays_of(cache: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(cache.rglob("*.npy"))}


def test_the_cache_is_used_again_and_not_for_other_data(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", ROWS)
    load(path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")}
    load(path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")} == before
    write(path, [*ROWS[:4], {"text": "Another last line."}])
    assert load(path).facts["sha256"] != ""
    others: list[dict[str, Any]] = [
        {"sequence_length": 17},
        {"pack": False},
        {"append_eos": False},
        {"max_documents": 3},
    ]
    for other in others:
        load(path, **other)
    load(path, small(added=["<|x|>"]))
    load(path, small(template="x"))
    folders = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert len(folders) == 8
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "extra", "manifest"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "r.jsonl", ROWS)
    load(path)
    before = arrays_of(tmp_path / "cache")
    (tokens,) = (tmp_path / "cache").rglob("tokens.npy")
    body = tokens.read_bytes()
    match damage:
        case "flip":
            tokens.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
        case "cut":
            tokens.write_bytes(body[:-3])
        case "missing":
            tokens.unlink()
        case "extra":
            (tokens.parent / "stray.npy").write_bytes(b"")
        case "manifest":
            (tokens.parent / "manifest.json").write_text("{}")
    load(path)
    assert arrays_of(tmp_path / "cache") == before


def test_threads_that_ask_at_once_make_the_data_once(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", ROWS * 50)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, [path] * 4))
    assert {data.tokens.tobytes() for data in found} == {found[0].tokens.tobytes()}
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def load_and_report(path: Path, queue: Any) -> None:
    queue.put(int(load(path).tokens.sum()))


def test_waiting_too_long_for_a_cache_lock_exits_with_try_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limbeck.data.load.LOCK_TIMEOUT_S", 0.1)
    path = write(tmp_path / "r.jsonl", ROWS)
    (tmp_path / "cache").mkdir()
    with (
        FileLock(tmp_path / "cache" / ".lock"),
        pytest.raises(TryLaterError, match="is being filled by another process") as info,
    ):
        load(path)
    assert info.value.exit_code == 75


@pytest.mark.slow
def test_processes_that_ask_at_once_get_the_same_data(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", ROWS * 50)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=load_and_report, args=(path, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sums == [int(load(path).tokens.sum())] * 3
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_progress_is_told_up_to_the_last_row(tmp_path: Path) -> None:
    from limbeck.config import DataConfig
    from limbeck.data import load_data

    told: list[tuple[int, int]] = []
    path = write(tmp_path / "r.jsonl", ROWS * 300)
    config = DataConfig(type="text", path=str(path), sequence_length=16)

    def note(rows: int, tokens: int) -> None:
        told.append((rows, tokens))

    data = load_data(config, TOKENIZER, cache=tmp_path / "c", max_positions=16, progress=note)
    assert told[-1] == (1500, len(data.tokens))
    assert told == sorted(told)
    assert len(told) > 1


def test_memory_for_what_is_not_yet_on_disk_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each chunk, tokens and documents are written before the next is read."""
    held: list[int] = []
    plain = Draft.append

    def count_and_append(draft: Draft, later: Draft, to: Any) -> None:
        held.append(sum(len(values) for values in later.arrays.values()))
        plain(draft, later, to)
        assert not any(draft.arrays.values())

    monkeypatch.setattr(Draft, "append", count_and_append)
    load(write(tmp_path / "r.jsonl", ROWS * 500))
    assert len(held) > 3
    assert max(held) <= 512 * 12


def test_the_corpus_is_small_and_its_parts_are_disjoint() -> None:
    parts = {}
    for name in ("train", "heldout"):
        path = corpus_path(name)
        rows = [
            row.values for row in open_source(ReadConfig(path=str(path)), Path()).rows(["text"])
        ]
        assert all(row.keys() == {"text", "source", "id"} for row in rows)
        parts[name] = rows
    assert len(parts["heldout"]) >= 60
    assert sum(corpus_path(name).stat().st_size for name in parts) < 3_000_000
    for key in ("id", "text"):
        train, held_out = ({row[key] for row in parts[name]} for name in ("train", "heldout"))
        assert not train & held_out
        assert len(held_out) == len(parts["heldout"])
    sources = {row["source"] for row in parts["train"]}
    assert len(sources) == 8
    assert sources == {row["source"] for row in parts["heldout"]}
    notice = (corpus_path("train").parent / "NOTICE").read_text(encoding="utf-8")
    assert all(f"\n{source} " in notice for source in sources)


def test_the_corpus_has_two_parts() -> None:
    with pytest.raises(ConfigError, match="parts train, heldout, and no 'test'"):
        corpus_path("test")


def test_a_rows_weight_is_that_of_all_its_tokens_however_they_are_cut(tmp_path: Path) -> None:
    weights = [0.5, 2, 0, 1.25, 3]
    rows = [row | {"worth": weight} for row, weight in zip(ROWS, weights, strict=True)]
    path = write(tmp_path / "rows.jsonl", rows)
    for pack in (True, False):
        data = load(path, TOKENIZER, sequence_length=12, pack=pack, columns={"weight": "worth"})
        batch = data.batch(range(data.num_rows))
        found = batch.token_weights()
        assert found is not None
        assert found.tolist() == [weights[document] for document in batch.documents().tolist()]
    plain = load(path, TOKENIZER, sequence_length=12)
    assert plain.batch([0]).weights is None
    # A store finds its samples by these, whether or not they are weighed.
    for name in ("tokens", "scored", "windows", "document_hashes"):
        assert np.array_equal(getattr(plain, name), getattr(data, name)), name


def test_a_rows_source_is_that_of_its_column_where_the_column_is_named(tmp_path: Path) -> None:
    names = ["code", "chat", "code", "prose", "chat"]
    rows = [row | {"source": name} for row, name in zip(ROWS, names, strict=True)]
    path = write(tmp_path / "rows.jsonl", rows)
    plain = load(path, TOKENIZER, sequence_length=12)
    assert {plain.document_source(d) for d in range(5)} == {"rows.jsonl"}
    assert plain.column_source(0) is None
    assert len(plain.document_sources) == 0
    named = load(path, TOKENIZER, sequence_length=12, columns={"source": "source"})
    assert [named.document_source(d) for d in range(5)] == names
    assert [named.column_source(d) for d in range(5)] == names
    assert named.document_sources.tolist() == [0, 1, 0, 2, 1]
    assert named.document_name(1) == "rows.jsonl:2", "messages name the line"
    # A store finds its samples by these, whether or not sources are named.
    for name in ("tokens", "scored", "windows", "document_hashes"):
        assert np.array_equal(getattr(plain, name), getattr(named, name)), name
