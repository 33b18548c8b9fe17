import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from limbeck.commands.shrink import require_new, require_one_size
from limbeck.errors import ConfigError, StorageError
from tests.commands.processes import limbeck
from tests.experiment.tiny_run import write_model, write_texts
from tests.tokenizers.small import small

NOTHING = dict.fromkeys(("layers", "keep", "params", "intermediate", "heads", "kv_heads", "hidden"))


def shrink_words(folder):
    write_model(folder / "teacher", rows=len(small()), layers=4)
    write_texts(folder / "train.jsonl", 40, 1)
    return ("shrink", "teacher", "--data", "train.jsonl", "--tokens", "64")


def test_shrink_writes_a_student_and_prints_plan_and_result(tmp_path):
    start = shrink_words(tmp_path)
    done = limbeck(*start, "--output", "student", "--layers", "3", cwd=tmp_path)
    assert "taken out" in done.stdout
    assert "before distillation KL" in done.stdout
    assert (tmp_path / "student" / "limbeck.json").is_file()
    planned = json.loads(limbeck(*start, "--keep", "0.7", "--plan", "--json", cwd=tmp_path).stdout)
    assert len(planned) == 3
    again = limbeck(*start, "--output", "student", "--layers", "3", cwd=tmp_path, code=2)
    assert "--output must be new" in again.stderr


def test_a_vocabulary_is_pruned_alone_or_before_layers(tmp_path):
    start = shrink_words(tmp_path)
    prune = (*start, "--vocabulary", "train.jsonl")
    done = limbeck(*prune, "--output", "small", cwd=tmp_path)
    assert "tokens kept" in done.stdout
    assert "the original teacher gives them a probability of" in " ".join(
        done.stdout.lower().split()
    )
    kept = json.loads((tmp_path / "small" / "vocabulary.json").read_text())["kept"]
    assert not (tmp_path / "small" / "importance.json").exists()
    table = ("shrink", "teacher", "--vocabulary", "small/vocabulary.json", "--data", "train.jsonl")
    more = ("--tokens", "64", "--layers", "3", "--output", "student", "--json")
    told = json.loads(limbeck(*table, *more, cwd=tmp_path).stdout)
    assert told["vocabulary"]["kept"] == told["made"]["vocabulary_rows"] == len(kept)
    assert told["made"]["layers"] == 3


def test_a_vocabulary_needs_no_other_size_except_with_plan():
    options = {"shape": "depth", "by": "loss", "vocabulary": ("data.jsonl",)}
    assert require_one_size(NOTHING, plan=False, **options) == "loss"
    with pytest.raises(ConfigError, match="A plan needs a target"):
        require_one_size(NOTHING, plan=True, **options)


@pytest.mark.parametrize(
    ("asked", "more", "message"),
    [
        ({}, {}, "got nothing. Use one of these"),
        ({"keep": 0.5, "layers": 3}, {}, "got --layers, --keep"),
        ({"keep": 0.5, "params": "1M"}, {}, "got --keep, --params"),
        ({"keep": 0.0}, {}, "must be above 0"),
        ({"layers": 3}, {"plan": True}, "A plan needs a target.*got --layers"),
        ({"layers": 3}, {"by": "luck"}, "--by must be one of even.*got 'luck'"),
        ({"keep": 0.5}, {"shape": "round"}, "--shape must be one of depth"),
    ],
)
def test_no_size_or_several_sizes_are_refused(asked, more, message):
    options = {"shape": "depth", "by": "loss", "plan": False, **more}
    with pytest.raises(ConfigError, match=message):
        require_one_size({**NOTHING, **asked}, **options)


def test_an_output_is_required_except_with_plan(tmp_path):
    with pytest.raises(ConfigError, match="--output must name a folder"):
        require_new(None, plan=False)
    require_new(None, plan=True)
    require_new(tmp_path, plan=False)
    with pytest.raises(ConfigError, match="A plan writes nothing"):
        require_new(tmp_path / "new", plan=True)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is none"):
        require_new(tmp_path / "file" / "new", plan=False)
    require_new(tmp_path / "a" / "b", plan=False)


def test_the_demos_student_lacks_the_layers_of_the_recorded_removals():
    recorded = Path(__file__).parents[2] / "docs" / "smollm2-135m-removals.json"
    removed = {removal["layer"] for removal in json.loads(recorded.read_text())["removals"]}
    demo = yaml.safe_load((files("limbeck.commands") / "recipes" / "demo.yaml").read_text())
    assert not removed & set(demo["student"]["layers"])
    assert len(removed) == 8
