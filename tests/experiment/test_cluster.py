"""Plans for clusters that are not here."""

import dataclasses
import io
import json
import shutil

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from limbeck.checks import cluster_findings, read_hardware
from limbeck.commands.check import check, plan_table
from limbeck.errors import ConfigError
from limbeck.experiment.cluster import plan_here, require_plannable
from limbeck.experiment.loading import load
from tests.distributed.processes import live
from tests.experiment.tiny_run import write_recipe

SMALL = "h100,memory_gib=3.0001"


def without_weights(folder):
    """A recipe whose models are configurations and tokenizers, and whose text is not there."""
    recipe = write_recipe(folder, optim={"tokens_per_step": 256}, evaluate={"data": None})
    teacher, student = folder / "teacher", folder / "student"
    for path in (folder / "train.jsonl", teacher / "model.safetensors"):
        path.unlink()
    shutil.copytree(teacher, student)
    return recipe


def run(*arguments):
    app = typer.Typer()
    app.command()(check)
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


def test_a_cluster_is_planned_from_configurations_alone(tmp_path):
    recipe = without_weights(tmp_path)
    result = run(recipe, f"student={{type: pretrained, path: {tmp_path / 'student'}}}", "--plan",
                 "--world-size", 4, "--device", "h100,per_node=2", "--json")  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    assert told["holds"] is True
    plan = told["plan"]
    assert plan["parameters"]["teacher"] == plan["parameters"]["student"]
    cluster = plan["cluster"]
    assert cluster["ranks"] == 4
    assert cluster["hardware"]["per_node"] == 2
    counts = {each["kind"]: each["count"] for each in cluster["collectives"]}
    assert counts["reduce-scatter"] == 6
    assert cluster["slowest_tokens_per_second"] < plan["tokens_per_second"]
    assert not (tmp_path / "run").exists()


def plan_small(recipe, folder):
    """A depth student, in a device that has no room beside the margin."""
    plan = plan_here(recipe, ["optim.tokens_per_step=64"], 2, read_hardware(SMALL))
    memory, work = cluster_findings(plan)
    text = json.dumps({"plan": dataclasses.asdict(plan), "memory": dataclasses.asdict(memory)})
    (folder / "plan.json").write_text(text)
    assert work.holds


WAYS = ("parallel.teacher=shard", "parallel.teacher=replicate", "parallel.teacher=offload")


WAYS_OF_SEVERAL = ("shard", "offload")


def plan_ways(recipe, folder):
    """Each way to keep a teacher, and gradients sent in bfloat16, on 4 simulated H100."""
    student = f"student={{type: pretrained, path: {folder / 'student'}}}"
    for way in (*WAYS, "parallel.reduce_dtype=bfloat16"):
        plan = plan_here(recipe, [student, way], 4, read_hardware("h100"))
        table = Console(width=200, record=True, file=io.StringIO())
        table.print(plan_table(plan))
        told = {"plan": dataclasses.asdict(plan), "text": table.export_text()}
        (folder / f"{way}.json").write_text(json.dumps(told))


def test_each_way_to_keep_the_teacher_is_planned(tmp_path):
    assert live(plan_ways, without_weights(tmp_path), tmp_path) == 0
    told = {
        way: json.loads((tmp_path / f"{way}.json").read_text())
        for way in (*WAYS, "parallel.reduce_dtype=bfloat16")
    }
    shard, replicate, offload, narrow = (each["plan"] for each in told.values())
    held = [plan["memory_bytes"].get("teacher weights", 0) for plan in (shard, replicate, offload)]
    buffers = held[2]  # rotary frequencies
    assert held[1] - buffers == 2 * shard["parameters"]["teacher"], "all of it, in bfloat16"
    assert held[0] - buffers == pytest.approx((held[1] - buffers) / 4, rel=0.01)
    assert 0 < buffers < 1000
    assert offload["host_bytes"] == held[0] - buffers
    assert shard["host_bytes"] == replicate["host_bytes"] == 0
    assert "host memory: teacher's shards" in told[WAYS[2]]["text"]
    assert "host memory" not in told[WAYS[0]]["text"]
    counts = [
        {each["kind"]: each for each in plan["cluster"]["collectives"]}
        for plan in (shard, replicate, offload, narrow)
    ]
    gathers = [each["all-gather"]["count"] for each in counts]
    units = 4 + 2  # blocks, embedding, root
    passes = shard["micro_batches_per_step"]
    assert gathers[0] == gathers[2] == gathers[1] + units * passes
    assert "teacher weights, gathered" not in replicate["memory_bytes"]
    summed = [each["reduce-scatter"]["whole_bytes"] for each in counts]
    assert summed[0] == summed[1] == summed[2] == 2 * summed[3]


def plan_several(recipe, folder, kinds):
    """One teacher, and two of it in each way, their weights on the device and in host memory."""
    one = load(recipe).teacher
    several = {"routed": {"a": one, "b": one}, "ensemble": [one, one]}
    student = f"student={{type: pretrained, path: {folder / 'student'}}}"
    for kind, way in kinds:
        changes = [student, f"parallel.teacher={way}"]
        if kind != "online":
            changes.append(f"teacher={json.dumps({'type': kind, 'teachers': several[kind]})}")
        plan = plan_here(recipe, changes, 1, read_hardware("h100"))
        (folder / f"{kind} {way}.json").write_text(json.dumps(dataclasses.asdict(plan)))


def test_all_of_several_teachers_are_planned(tmp_path):
    kinds = [(kind, way) for kind in ("online", "routed", "ensemble") for way in WAYS_OF_SEVERAL]
    assert live(plan_several, without_weights(tmp_path), tmp_path, kinds) == 0
    plans = {key: json.loads((tmp_path / "{} {}.json".format(*key)).read_text()) for key in kinds}
    one = plans["online", "shard"]
    weights = "teacher weights"
    for kind in ("routed", "ensemble"):
        on_device, offloaded = plans[kind, "shard"], plans[kind, "offload"]
        assert on_device["parameters"]["teacher"] == 2 * one["parameters"]["teacher"]
        assert on_device["memory_bytes"][weights] == 2 * one["memory_bytes"][weights]
        saved = on_device["memory_bytes"][weights] - offloaded["memory_bytes"][weights]
        assert offloaded["host_bytes"] == saved == 2 * plans["online", "offload"]["host_bytes"]
        peaks = [sum(plan["memory_bytes"].values()) for plan in (on_device, offloaded)]
        assert peaks[0] - peaks[1] == saved, "nothing else changes"
    flops = {kind: plans[kind, "shard"]["cluster"]["flops"] for kind in ("routed", "ensemble")}
    own = flops["ensemble"] - one["cluster"]["flops"]
    assert own > 0, "a pass of the second teacher"
    assert 0 < flops["routed"] - one["cluster"]["flops"] <= own, "every member reads every row"


@pytest.mark.long
def test_what_does_not_fit_is_said_with_the_options_that_were_tried(tmp_path):
    recipe = without_weights(tmp_path)
    assert live(plan_small, recipe, tmp_path) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    plan = told["plan"]
    assert plan["parameters"]["student"] < plan["parameters"]["teacher"]
    assert plan["micro_batches_per_step"] == 1
    memory = told["memory"]
    assert not memory["holds"]
    assert memory["decides"] is False, "the margin alone is too large, and it is a guess"
    (fix,) = plan["cluster"]["fixes"]
    assert fix["peak_bytes"] < sum(plan["memory_bytes"].values())
    assert fix["overrides"].startswith("memory.micro_batch=1 memory.activation_checkpointing=full")
    assert fix["overrides"].endswith("parallel.teacher=offload"), "the last resort"
    assert fix["overrides"] in memory["found"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("optim.steps=null", "optim.epochs=1"), "optim.steps must be given"),
        (("student={type: width, keep: 0.5}",), r"student\.type: a width student is measured"),
        (("trainable.lora={quantize: 4bit}",), r"trainable\.lora\.quantize: a plan .* got 4bit"),
        (("optim.type=adamw_8bit",), "adamw_8bit reads its tensors"),
        (("rollout={tokens: 8, prompt_tokens: 8}", "objective.alpha=1"), "rollout: text written"),
    ],
)
def test_what_cannot_be_planned_without_weights_and_text_is_refused(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        require_plannable(load(without_weights(tmp_path), change))


@pytest.mark.parametrize("text", ["h1000", "h100,memory=3", "h100,tflops=fast", "h100,tflops=-1"])
def test_a_device_must_be_known_and_its_figures_numbers(text):
    with pytest.raises(ConfigError, match="--device"):
        read_hardware(text)


def test_figures_of_a_device_can_be_replaced():
    device = read_hardware("h100, memory_gib=94, per_node=4")
    assert (device.memory_bytes, device.per_node, device.tflops) == (94 << 30, 4, 989)
    within, across = device.bytes_per_second(4), device.bytes_per_second(8)
    assert within == 450e9
    assert across == 4 * 50e9


@pytest.mark.parametrize(
    ("ranks", "stride", "expected"),
    [(8, 1, 450), (2, 4, 450), (2, 8, 50), (8, 8, 50), (8, 4, 100), (64, 1, 400), (4, 16, 50)],
)
def test_rings_of_a_node_share_its_network(ranks, stride, expected):
    """8 devices of 50 GB/s a node: 8 rings get 50 each, 4 get 100, one that passes through 400."""
    assert read_hardware("h100").bytes_per_second(ranks, stride) == expected * 1e9
