"""What other tools recorded becomes a store, or is refused with its file and row."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from limbeck.errors import ConfigError, DataError
from limbeck.losses.distributions import TopK
from limbeck.store import Sample, Store, verify
from limbeck.store.importing import import_store
from tests.store.small_store import header

K, VOCABULARY = 4, 300


def taught(seed, length=9):
    """Tokens, and a teacher's top-k at each position but the last."""
    torch.manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (length,))
    return tokens, TopK.from_logits(3 * torch.randn(length - 1, VOCABULARY), K)


def parquet_rows(seeds, **more):
    rows = []
    for seed in seeds:
        tokens, top = taught(seed)
        row = {"input_ids": tokens.tolist(), "token_ids": top.ids.tolist()}
        rows.append(row | {"top_values": top.logprobs.tolist()} | more)
    return rows


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def vllm_line(seed):
    tokens, top = taught(seed)
    told = [None]
    for ids, logprobs in zip(top.ids.tolist(), top.logprobs.tolist(), strict=True):
        entry = {
            str(i): {"logprob": p, "rank": 1, "decoded_token": "x"}
            for i, p in zip(ids, logprobs, strict=True)
        }
        least = {str(next(i for i in range(VOCABULARY) if i not in ids)): {"logprob": -30.0}}
        told.append(least | entry)  # the prompt's own token, beyond the top k
    return json.dumps({"prompt_token_ids": tokens.tolist(), "prompt_logprobs": told})


def assert_taught(store, seed, labels=None):
    tokens, top = taught(seed)
    scored = np.ones(len(tokens) - 1, bool) if labels is None else np.array(labels[1:]) != -100
    found = store.read(Sample(tokens.numpy().astype(np.int32), scored).key).signal
    assert torch.equal(found.ids.sort(-1).values, top.ids[scored].sort(-1).values)
    assert (found.tail_logprob.exp() - top.tail_logprob[scored].exp()).abs().max() < 1e-3


def test_parquet_rows_become_a_store_of_a_shard_a_file(tmp_path):
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", parquet_rows([1, 2]))
    labels = [-100, -100, *[5] * 7]
    write_parquet(tmp_path / "in" / "b.parquet", parquet_rows([3], labels=labels))
    told = import_store(tmp_path / "in", tmp_path / "out", header({"type": "top_k", "k": K}))
    assert told.num_shards == 2
    store = Store.open(tmp_path / "out")
    assert len(list(store.keys())) == 3
    assert_taught(store, 1)
    assert_taught(store, 3, labels)
    assert verify(tmp_path / "out") == []


def test_vllm_lines_become_a_store_shifted_by_one_position(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{vllm_line(1)}\n\n{vllm_line(2)}\n")
    import_store(tmp_path / "a.jsonl", tmp_path / "out", header({"type": "top_k", "k": K}))
    store = Store.open(tmp_path / "out")
    for seed in (1, 2):
        assert_taught(store, seed)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"token_ids": [[1, 2, 3, 300]] * 8},
            r"a\.parquet, row 0: token ids must be from 0 to 299",
        ),
        ({"token_ids": [[1, 2, 3, 3]] * 8}, r"row 0: a position names a token twice"),
        ({"top_values": [[-0.1, -0.2, -0.3, -0.4]] * 8}, r"row 0: .*at most 1, got 3.1.*logits\?"),
        ({"top_values": [[-1.0, -2.0, -3.0, 4.0]] * 8}, "must be numbers of at most 0"),
        ({"top_values": [[-1.0, -2.0, -3.0]] * 8}, "form.k is 4, and a position has 3 tokens"),
        ({"token_ids": [[1, 2, 3, 4]] * 5}, "must have top tokens at 8 positions.*got 5 and 8"),
        (
            {"input_ids": None},
            r"a\.parquet, row 0: tokens, ids and log-probabilities must be lists",
        ),
        ({"token_ids": 3}, "must be lists"),
        ({"input_ids": ["a"] * 9}, "tokens must be 9 whole numbers"),
        ({"input_ids": [2**40] * 9}, "from 0 to 299.*got 2,147,483,647"),
        ({"labels": [1, 2]}, "row 0: labels must be 9 whole numbers"),
        ({"token_ids": [["a"] * 4] * 8}, "token ids must be 8 x 4 whole numbers"),
    ],
)
def test_wrong_rows_are_refused(change, told, tmp_path):
    write_parquet(tmp_path / "a.parquet", [parquet_rows([1])[0] | change])
    with pytest.raises(DataError, match=told):
        import_store(tmp_path / "a.parquet", tmp_path / "out", header({"type": "top_k", "k": K}))
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


LINE = json.loads(vllm_line(1))
TOP = {str(i): {"logprob": -3.0} for i in range(K)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": [1, 2]}, r"a\.jsonl:2: labels must be 9 whole numbers"),
        ({"labels": "no labels"}, "labels must be 9 whole numbers"),
        ({"labels": [None] * 9}, "labels must be 9 whole numbers"),
        ({"prompt_token_ids": [2**40] * 9}, "from 0 to 299"),
        ({"prompt_token_ids": [1.5] * 9}, "tokens must be 9 whole numbers"),
        ({"prompt_token_ids": [[1]] * 9}, "tokens must be 9 whole numbers"),
        (
            {"prompt_logprobs": [None, *[{str(int(i) + 2**70): v for i, v in TOP.items()}] * 8]},
            "token ids must be 8 x 4 whole numbers",
        ),
    ],
)
def test_wrong_lines_are_refused_and_nothing_is_left(change, told, tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{vllm_line(2)}\n{json.dumps(LINE | change)}")
    with pytest.raises(DataError, match=told):
        import_store(tmp_path / "a.jsonl", tmp_path / "out", header({"type": "top_k", "k": K}))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_other_files_are_another_store_and_a_folder_that_holds_one_is_refused(tmp_path):
    told = header({"type": "top_k", "k": K})
    (tmp_path / "a.jsonl").write_text(vllm_line(1))
    (tmp_path / "b.jsonl").write_text(vllm_line(2))
    one, other = (import_store(tmp_path / f"{n}.jsonl", tmp_path / n, told) for n in "ab")
    assert one.differences({"data": other.data})
    with pytest.raises(ConfigError, match=r"needs a new folder, and .* holds something"):
        import_store(tmp_path / "b.jsonl", tmp_path / "a", told)
    assert_taught(Store.open(tmp_path / "a"), 1)


def test_wrong_files_are_refused(tmp_path):
    told = header({"type": "top_k", "k": K})
    write_parquet(tmp_path / "a.parquet", [{"input_ids": [1, 2]}])
    with pytest.raises(DataError, match="lacks token_ids, top_values"):
        import_store(tmp_path / "a.parquet", tmp_path / "out", told)
    write_parquet(tmp_path / "b.parquet", [{"input_ids": [1], "compressed_logprobs": [[1]]}])
    with pytest.raises(DataError, match="Decompress them with the tool that wrote them"):
        import_store(tmp_path / "b.parquet", tmp_path / "out", told)
    (tmp_path / "c.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="must be a Parquet file, but cannot be read"):
        import_store(tmp_path / "c.parquet", tmp_path / "out", told)
    for line in ("nonsense", "[]", '{"prompt_token_ids": [1, 2]}', '{"prompt_logprobs": [1, 2]}'):
        (tmp_path / "d.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"d\.jsonl:1 must be an object"):
            import_store(tmp_path / "d.jsonl", tmp_path / "out", told)
    with pytest.raises(DataError, match="must be, or hold, files ending in"):
        import_store(tmp_path / "e.csv", tmp_path / "out", told)
    with pytest.raises(ConfigError, match="must have the form top_k at one temperature"):
        import_store(tmp_path / "a.parquet", tmp_path / "out", header({"type": "hidden"}))
