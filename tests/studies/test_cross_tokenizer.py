"""The study of unlike tokenizers runs over a tiny teacher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import tiny_config
from tests.tokenizers.assorted import byte_bpe, wrap_plain

SCRIPT = Path(__file__).parents[2] / "studies" / "cross_tokenizer" / "run.py"


@pytest.mark.long
def test_every_trial_runs_and_is_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    tokenizer = wrap_plain(byte_bpe(600, digits=True))
    config = tiny_config("llama", 4, vocabulary=len(tokenizer), tie_word_embeddings=True)
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    trials = ["root_kl_0.5", "alm_0.5"]
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--teacher", str(tmp_path / "teacher"), "--vocabulary", "400", "--layers", "2"]
    command += ["--steps", "2", "--length", "64", "--held-out-tokens", "512", "--documents", "20"]
    command += ["--trials", *trials]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["trial"] for row in rows] == ["cross_entropy", *trials]
    assert rows[0]["difference"]["value"] == 0.0
    assert all(row["difference"]["value"] != 0.0 for row in rows[1:])
    assert "| root_kl_0.5 |" in done.stdout
