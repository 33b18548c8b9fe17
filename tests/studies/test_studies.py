"""Every study runs over a tiny teacher, from nothing to its table."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import tiny_config
from tests.tokenizers.assorted import byte_bpe, wrap_plain

FOLDER = Path(__file__).parents[2] / "studies"
OPTIONS = {
    "cross_tokenizer": "--tokenizer unigram --vocabulary 700 --layers 0 2 --length 64 "
    "--documents 20 --trials root_kl_0.5 alm_0.5 shared_kl_0.5",
    "on_policy": "--layers 0 2 --cold-steps 1 --prompts 3",
    "quantization": "--layers 0 2 --float-steps 1",
    "routed": "--layers 0 2 --length 64",
}


def run(study, options, tmp_path, monkeypatch):
    """Run a study with two seeds; its output."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    write_teacher(tmp_path / "teacher")
    command = [sys.executable, str(FOLDER / f"{study}.py"), "--output", str(tmp_path / "out")]
    command += ["--teacher", str(tmp_path / "teacher"), *options.split()]
    command += ["--seeds", "1", "2", "--steps", "2", "--held-out-tokens", "512"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("study", OPTIONS)
def test_a_study_trains_its_trials_and_compares_them(study, tmp_path, monkeypatch):
    output = run(study, OPTIONS[study], tmp_path, monkeypatch)
    trials = json.loads((tmp_path / "out" / "results.json").read_text())
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in output
    assert [name for name in trials if f"\n| {name} | " not in table] == []
    assert "+0.000 [+0.000, +0.000]" in table.replace("0.0000", "0.000")  # the base of the others


@pytest.mark.long
def test_published_orderings_are_tested(tmp_path, monkeypatch):
    output = run("orderings", "--layers 0 2 --study signals", tmp_path, monkeypatch)
    found = json.loads((tmp_path / "out" / "signals.json").read_text())
    assert (tmp_path / "out" / "signals.md").read_text() in output
    trials = found["trials"]
    assert trials["KL"]["forward_kl"] != trials["12 tokens alone"]["forward_kl"]
    for claim in found["claims"]:
        gap = trials[claim["smaller"]][claim["metric"]] - trials[claim["larger"]][claim["metric"]]
        assert claim["difference"]["value"] == pytest.approx(gap, abs=1e-9)
        if claim["verdict"] == "holds":
            assert gap < 0


def write_teacher(folder):
    """A random model with a tokenizer of its own."""
    tokenizer = wrap_plain(byte_bpe(600, digits=True))
    sizes = {"vocabulary": len(tokenizer), "width": 64, "max_position_embeddings": 512}
    config = tiny_config("llama", 4, tie_word_embeddings=True, **sizes)
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_trial_with_other_options_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    trials = importlib.import_module("trials")
    (tmp_path / "KL-1").mkdir()
    (tmp_path / "KL-1" / "report.html").touch()
    tree = {"output": str(tmp_path / "KL-1"), "optim": {"steps": 40}}
    (tmp_path / "KL-1.yaml").write_text(json.dumps(tree, indent=1))
    assert trials.trained(tree) == tmp_path / "KL-1"
    with pytest.raises(SystemExit, match="other options"):
        trials.trained(tree | {"optim": {"steps": 400}})
