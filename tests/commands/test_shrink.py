import json
from importlib.resources import files
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from limbeck.commands.shrink import plan_table, require_new, require_one_size
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


def test_the_headings_of_a_plan_stay_whole_at_80_columns():
    widths = {"width": 504, "inner": 1280, "heads": 9, "kv_heads": 3}
    facts = {"bytes": 4 * 181_423_424, "tokens_per_second": 123_456.0, "speed_ratio": 1.72}
    facts |= {"parameters": 181_423_424, "forward_kl": 11.234, "cross_entropy": 12.345}
    shapes = [("depth and width", widths), ("depth", {})]
    rows = [{**facts, "shape": shape, "layers": 15, "widths": w} for shape, w in shapes]
    console = Console(width=80, file=StringIO())
    console.print(plan_table(rows))
    text = console.file.getvalue()
    headings = ["shape", "layers", "widths", "parameters", "speed", "KL", "CE"]
    assert text.splitlines()[2].split() == headings
    for figure in ("181", "726", "hidden", "504", "1280", "123,456/s", "1.72 x", "11.234"):
        assert figure in text


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
