"""`limbeck shrink --vocabulary` from a folder to a folder, and from there into a run."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from limbeck.data import corpus_path
from limbeck.errors import ConfigError, DataError
from limbeck.experiment import shrink as shrinking
from limbeck.experiment import vocabulary as vocabularies
from limbeck.files import manifest, sha256
from limbeck.models import ModelSource, cache_folder, embedded_teacher
from limbeck.tokenizers import tokenizer_hash
from tests.experiment.tiny_run import write_model, write_recipe, write_texts
from tests.tokenizers.small import CHATML, SENTENCES, edited, small

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "teacher", rows=384)
    write_texts(tmp_path / "train.jsonl", 40, 1)
    return tmp_path


def opened(folder, name="teacher"):
    return vocabularies.open_teacher(ModelSource(str(folder / name)), CPU)


def pruned(folder, *names):
    made = vocabularies.prune_vocabulary(
        opened(folder), [str(folder / n) for n in names or ("train.jsonl",)], "text"
    )
    text = vocabularies.read(str(folder / "train.jsonl"), "text", made.tokenizer, 64)
    return vocabularies.measured(made, text, 64)


def test_a_pruned_folder_is_an_ordinary_model_that_says_what_it_kept(folder):
    made = pruned(folder)
    vocabularies.save_pruned(made, folder / "small")
    assert manifest(folder / "small") is not None, "published whole"
    plain = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32).eval()
    old = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "small")
    kept = torch.tensor(made.kept)
    assert plain.config.vocab_size == len(tokenizer) == len(kept) < len(small())
    assert plain.config.eos_token_id == tokenizer.eos_token_id
    for line in (folder / "train.jsonl").read_text().splitlines()[:8]:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids
        whole = small()(json.loads(line)["text"], return_tensors="pt").input_ids
        assert torch.equal(kept[ids], whole)
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, old(whole).logits[..., kept])
    told = json.loads((folder / "small" / "limbeck.json").read_text())
    facts = told["vocabulary"]
    assert facts["sha256"] == sha256(folder / "small" / facts["table"])
    assert facts["kept"] == len(kept) == told["made"]["vocabulary_rows"]
    assert facts["of"] == len(small())
    assert facts["data"] == [{"name": "train.jsonl", "sha256": facts["data"][0]["sha256"]}]
    assert facts["parameters_saved"] == 2 * 32 * (384 - len(kept))
    assert told["teacher"]["vocabulary_rows"] == 384
    assert told["made"]["layers_kept"] == [0, 1, 2, 3]
    table = json.loads((folder / "small" / "vocabulary.json").read_text())
    assert table["kept"] == list(made.kept)
    assert table["tokenizer_sha256"] == tokenizer_hash(tokenizer)
    for file in (folder / "small").glob("*.json*"):
        assert str(folder) not in file.read_text()


def test_the_kept_probability_is_that_of_the_whole_teachers_distribution(folder):
    made = pruned(folder)
    whole = made.teacher.model
    text = vocabularies.read(str(folder / "train.jsonl"), "text", small(), 64)
    wanted = []
    for row in range(text.num_rows):
        if sum(len(p) for p in wanted) >= made.facts["kept_probability"]["tokens"]:
            break
        batch = text.batch([row])
        with torch.no_grad():
            p = torch.softmax(whole.head(whole(batch)[0]).double(), -1)
        wanted.append(p[:, list(made.kept)].sum(-1))
    mass = torch.cat(wanted)
    assert made.facts["kept_probability"] == {
        "text": "train.jsonl",
        "tokens": len(mass),
        "mean": pytest.approx(float(mass.mean()), rel=1e-5),
        "min": pytest.approx(float(mass.min()), rel=1e-5),
        "nats": pytest.approx(float(-mass.log().mean()), rel=1e-5),
    }


def test_an_id_in_the_configuration_that_is_no_token_becomes_none(folder):
    def hole(tree):
        del tree["model"]["vocab"]["".join(tree["model"]["merges"].pop())]
        tree["model"]["vocab"]["<last>"] = 320

    edited(hole).save_pretrained(folder / "teacher")
    teacher = opened(folder)
    teacher.model.hf_model.config.pad_token_id = 319
    made = vocabularies.prune_vocabulary(teacher, [str(folder / "train.jsonl")], "text")
    assert made.model.config.pad_token_id is None
    assert made.tokenizer.eos_token_id == made.model.config.eos_token_id == 0


def test_more_data_keep_more_tokens(folder):
    (folder / "more.jsonl").write_text(json.dumps({"text": SENTENCES[3]}) + "\n")
    assert {*pruned(folder).kept} < {*pruned(folder, "train.jsonl", "more.jsonl").kept}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_chats_and_completions_are_read_as_before(kind, folder):
    tokenizer = small(template=CHATML)
    tokenizer.save_pretrained(folder / "teacher")
    rows = {
        "chat": {
            "messages": [
                {"role": "user", "content": "what rises"},
                {"role": "assistant", "content": "the spirit"},
            ]
        },
        "completion": {"prompt": "what rises: ", "completion": "the spirit"},
    }
    (folder / "rows.jsonl").write_text(json.dumps(rows[kind]) + "\n")
    made = vocabularies.prune_vocabulary(opened(folder), [str(folder / "rows.jsonl")], kind)
    assert made.facts["kept"] == len(made.tokenizer) < len(tokenizer)
    assert made.tokenizer.chat_template == CHATML


def test_data_that_would_be_read_otherwise_are_refused_with_the_row(folder):
    before = vocabularies.read(str(folder / "train.jsonl"), "text", small(), 64)
    made = pruned(folder)
    after = vocabularies.read(str(folder / "train.jsonl"), "text", made.tokenizer, 64)
    vocabularies.prove_same_reading(before, after, made.kept)
    other = after.tokens.copy()
    third = int(after.windows[after.windows[:, 2] == 2][0, 0])
    other[third + 1] += 1
    wrong = dataclasses.replace(after, tokens=other)
    with pytest.raises(
        ConfigError, match=r"train\.jsonl:3 of .* other tokens .* Keep the whole vocab"
    ):
        vocabularies.prove_same_reading(before, wrong, made.kept)
    short = dataclasses.replace(after, tokens=after.tokens[:-1], scored=after.scored[:-1])
    with pytest.raises(ConfigError, match=r"train\.jsonl:40 of .* becomes other tokens"):
        vocabularies.prove_same_reading(before, short, made.kept)


def test_a_second_model_is_pruned_alike_by_the_table(folder):
    vocabularies.save_pruned(pruned(folder), folder / "small")
    write_model(folder / "other", rows=320, layers=2, seed=1)
    table = str(folder / "small" / "vocabulary.json")
    made = vocabularies.prune_vocabulary(opened(folder, "other"), [table], "text")
    assert made.kept == pruned(folder).kept
    assert tokenizer_hash(made.tokenizer) == tokenizer_hash(pruned(folder).tokenizer)
    assert "used" not in made.facts
    with pytest.raises(ConfigError, match=r"by one vocabulary\.json, got .*Leave out the oth"):
        vocabularies.prune_vocabulary(opened(folder), [table, str(folder / "train.jsonl")], "text")


def test_a_table_of_another_tokenizer_or_a_damaged_one_is_refused(folder):
    vocabularies.save_pruned(pruned(folder), folder / "small")
    path = folder / "small" / "vocabulary.json"
    with pytest.raises(ConfigError, match=r"have the same tokenizer, but that of .* is for .*Use"):
        vocabularies.prune_vocabulary(opened(folder, "small"), [str(path)], "text")
    table = json.loads(path.read_text())
    for kept in (table["kept"][:-1], [*table["kept"], 9999]):
        path.write_text(json.dumps(table | {"kept": kept}))
        with pytest.raises(DataError, match=r"must give the tokenizer .* gives another\. Fet"):
            vocabularies.prune_vocabulary(opened(folder), [str(path)], "text")
    for text in ("{", "[]", '{"kept": ["x"]}'):
        path.write_text(text)
        with pytest.raises(DataError, match="must be a list of kept tokens"):
            vocabularies.prune_vocabulary(opened(folder), [str(path)], "text")


def test_a_student_of_fewer_tokens_and_layers_learns_from_the_pruned_teacher(folder):
    vocabularies.save_pruned(pruned(folder), folder / "small")
    setup = shrinking.open_shrink(
        ModelSource(str(folder / "teacher")),
        kind="text",
        data=str(folder / "train.jsonl"),
        tokens=64,
        device=CPU,
        vocabulary=[str(folder / "train.jsonl")],
    )
    found = shrinking.shrink(setup, {"type": "depth", "layers": [0, 1, 3]})
    shrinking.save_shrunk(setup, found, folder / "student")
    told = json.loads((folder / "student" / "limbeck.json").read_text())
    assert told["teacher"]["vocabulary_rows"] == 384, "the teacher as it was found"
    first, second = (folder / name / "vocabulary.json" for name in ("small", "student"))
    assert first.read_bytes() == second.read_bytes()
    path = write_recipe(folder, optim={"steps": 2, "warmup_steps": 0}, evaluate={"every": 9})
    write_texts(folder / "held.jsonl", 12, 2)
    recipe = json.loads(path.read_text())
    recipe["teacher"]["path"] = str(folder / "small")
    recipe["student"] = {"type": "pretrained", "path": str(folder / "student")}
    path.write_text(json.dumps(recipe))
    with limbeck.assemble(limbeck.load(path)) as run:
        assert run.train().report.exists()
    plain = AutoModelForCausalLM.from_pretrained(folder / "run" / "student")
    assert plain.config.vocab_size == setup.pruned.facts["kept"]
    recipe["teacher"]["path"] = str(folder / "teacher")
    path.write_text(json.dumps(recipe | {"output": str(folder / "again")}))
    with pytest.raises(ConfigError, match="Every token id must mean the same"):
        limbeck.assemble(limbeck.load(path))


@pytest.mark.slow
def test_smollm2_pruned_to_the_corpus_is_itself_in_plain_transformers(tmp_path):
    folder = embedded_teacher(cache_folder(), print)
    teacher = vocabularies.open_teacher(ModelSource(str(folder)), CPU)
    made = vocabularies.prune_vocabulary(teacher, [str(corpus_path("heldout"))], "text")
    text = vocabularies.read(str(corpus_path("heldout")), "text", made.tokenizer, 8192)
    made = vocabularies.measured(made, text, 256)
    vocabularies.save_pruned(made, tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    kept = torch.tensor(made.kept)
    assert len(tokenizer) == plain.config.vocab_size == len(kept) < 20_000
    saved = 576 * (49_152 - len(kept))
    assert plain.num_parameters() == teacher.model.num_parameters - saved
    ids = text.batch([0]).input_ids[:, :64]
    with torch.no_grad():
        wanted = teacher.model.hf_model(kept[ids]).logits[..., kept]
        assert torch.equal(plain(ids).logits, wanted)
    chat = [{"role": "user", "content": "What is a still? 日本語 🎉"}]
    ours, theirs = (
        t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for t in (tokenizer, teacher.tokenizer)
    )
    assert ours == theirs
    read = tokenizer(ours).input_ids
    assert tokenizer.decode(read) == teacher.tokenizer.decode(teacher.tokenizer(ours).input_ids)
    assert (plain.config.bos_token_id, plain.config.eos_token_id) == (1, 2)
