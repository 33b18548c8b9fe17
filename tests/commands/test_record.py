"""`limbeck record` and `limbeck store` as a person or a scheduler calls them."""

import json
import shutil

import pytest
import torch

from limbeck.experiment import load
from limbeck.recording import Recording
from tests.commands.processes import limbeck
from tests.experiment.recordings import contents, recording_recipe
from tests.experiment.tiny_run import steps_of

TOP_K = {"type": "top_k", "k": 8}


def damage(folder):
    path = folder / "store" / "shard-00001" / "data.parquet"
    if not path.exists():
        path = max((folder / "store" / "shard-00001").iterdir(), key=lambda p: p.stat().st_size)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)


@pytest.mark.slow
def test_a_store_is_budgeted_recorded_in_parts_merged_verified_and_repaired(tmp_path):
    recording_recipe(tmp_path, TOP_K)
    told, _ = limbeck("record", "recipe.yaml", "--budget", "--json", cwd=tmp_path)
    budget = json.loads(told)
    assert budget["settings"][0]["form"] == {**TOP_K, "min_prob": 0.0, "temperatures": [1.0]}
    assert not (tmp_path / "store").exists()
    told, progress = limbeck("record", "recipe.yaml", "--no-budget", cwd=tmp_path)
    assert "not there yet" not in told
    assert "bytes/token" in progress
    whole = contents(tmp_path / "store")
    told, _ = limbeck("store", "ls", "store", "--json", cwd=tmp_path)
    shards = json.loads(told)["num_shards"]
    assert json.loads(told)["finished_shards"] == shards > 2
    told, _ = limbeck("store", "ls", "store", cwd=tmp_path)
    assert "form       top_k, k: 8" in told
    told, _ = limbeck("store", "verify", "store", cwd=tmp_path)
    assert "store is whole." in told
    damage(tmp_path)
    told, _ = limbeck("store", "ls", "store", "--json", cwd=tmp_path)
    assert json.loads(told)["finished_shards"] == shards  # what is inside them is for `verify`
    told, error = limbeck("store", "verify", "store", code=3, cwd=tmp_path)
    assert "shard 1" in told
    assert "limbeck store repair store" in error
    told, _ = limbeck("store", "repair", "store", cwd=tmp_path)
    assert "shard 1: store/shard-00001" in told
    assert "renamed to damaged-" in told
    told, _ = limbeck("store", "ls", "store", cwd=tmp_path)
    assert f"shards     {shards - 1} of {shards}" in told
    told, _ = limbeck("record", "recipe.yaml", "--no-budget", "--json", cwd=tmp_path)
    assert json.loads(told)["recorded"] == 1
    for aside in (tmp_path / "store").glob("damaged-*"):
        shutil.rmtree(aside)
    assert contents(tmp_path / "store") == whole
    for part in ("1/2", "2/2"):
        output = f"record.output=part-{part[0]}"
        limbeck("record", "recipe.yaml", output, "--shards", part, "--no-budget", cwd=tmp_path)
    _, error = limbeck("store", "merge", "part-1", "--output", "joined", code=3, cwd=tmp_path)
    assert "the parts together lack" in error
    limbeck("store", "merge", "part-1", "part-2", "--output", "joined", cwd=tmp_path)
    assert contents(tmp_path / "joined") == whole


@pytest.mark.slow
def test_errors_exit_with_the_code_of_their_kind(tmp_path):
    recording_recipe(tmp_path, TOP_K)
    _, error = limbeck("record", "recipe.yaml", "--shards", "3/2", code=2, cwd=tmp_path)
    assert "--shards must say which part of how many" in error
    _, error = limbeck("record", "recipe.yaml", "record.form.k=400", code=2, cwd=tmp_path)
    assert "form.k must be less than the teacher's 320 tokens, got 400" in error
    _, error = limbeck("record", "recipe.yaml", "record.output=teacher", code=2, cwd=tmp_path)
    assert "teacher holds config.json, " in error
    _, error = limbeck("store", "ls", "nowhere", code=3, cwd=tmp_path)
    assert "nowhere must be a store" in error


@pytest.mark.slow
def test_what_vllm_recorded_trains_a_student(tmp_path):
    """One line a window, as vLLM says it: the distribution *of* token i stands at place i."""
    path = recording_recipe(tmp_path, TOP_K)
    recipe = json.loads(path.read_text())
    recipe["evaluate"] = {}
    recipe["data"]["pack"] = False
    recipe["objective"]["temperature"] = 1.0
    path.write_text(json.dumps(recipe))
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
        with Recording(load(path)) as recording:
            plan, model = recording.plan, recording.teacher.model
            for shard in plan.shards:
                for place in shard:
                    tokens = plan.sample(place).tokens.tolist()
                    with torch.no_grad():
                        logits = model.logits(torch.tensor([tokens[:-1]]))[0]
                    top = torch.log_softmax(logits, -1).topk(8)
                    told = [
                        {str(i): {"logprob": p} for i, p in zip(ids, ps, strict=True)}
                        for ids, ps in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                    ]
                    row = {"prompt_token_ids": tokens, "prompt_logprobs": [None, *told]}
                    lines.append(json.dumps(row))
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines))
    options = ["--output", "store", "--tokenizer", "teacher", "--k", "8"]
    told, _ = limbeck("store", "import", "theirs.jsonl", *options, cwd=tmp_path)
    assert "store has 1 shard(s)." in told
    from_it = ["teacher={type: stored, path: store}", "student.path=teacher"]
    limbeck("distill", "recipe.yaml", *from_it, "output=imported", cwd=tmp_path)
    limbeck("record", "recipe.yaml", "record.output=ours", "--no-budget", cwd=tmp_path)
    ours = ["teacher={type: stored, path: ours}", "student.path=teacher"]
    limbeck("distill", "recipe.yaml", *ours, "output=recorded", cwd=tmp_path)
    mine, theirs = steps_of(tmp_path / "imported"), steps_of(tmp_path / "recorded")
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
