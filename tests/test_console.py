"""The commands of console blocks run in a shell, over tiny models under the names shown."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.experiment.tiny_run import write_recipe, write_texts
from tests.models.tiny import tiny_config
from tests.tokenizers.small import CHATML, small

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"\n\n((?:    [^\n]*\n)+)")
STARTS = ("limbeck ", "make", "pip", "python3", "cp ", "echo", "torchrun", "vllm", "export ")

NOT_RUN = {
    "python3 -m venv": "makes an environment from a package registry",
    "pip install": "installs from a package registry",
    "make ": "installs from a package registry, and then runs these tests, the demo or benchmarks",
    "vllm serve": "needs a GPU; tests/teachers/test_served.py has a server of its interface",
    "torchrun": "needs 8 GPUs, or several machines; tests start 2 processes of the same commands",
    "export TORCH_DISABLE": "belongs to several machines",
    "limbeck check recipe.yaml objective.alpha=-1": "is refused; tests/test_docs.py compares it",
    "limbeck distill recipe.yaml objective": "is refused; tests/test_docs.py compares the answer",
    "limbeck distill recipe.yaml optim": "is refused; tests/test_docs.py compares the answer",
    "limbeck distill recipe.yaml evaluate": "is refused; tests/test_docs.py compares the answer",
    "limbeck distill recipe.yaml 'student": "is refused; tests/test_docs.py compares the answer",
    "limbeck distill recipe.yaml 'objective": "is refused; tests/test_docs.py compares the answer",
    "limbeck store import": "reads a file of another tool; tests/store/test_importing.py has one",
    "limbeck forecast": "takes minutes and more text; tests/experiment/test_forecast.py runs it",
    "limbeck write recipe.yaml #": "is the command of docs/sequence-level.md, which is run",
    "limbeck export runs/q1.5b --format executorch": "needs an extra of 405 MB, not in the tests'",
}
"""Commands that do not run here, by their beginnings, and why."""

INSTEAD = {
    " 1.5B ": " 200K ",
    "--params 900M": "--params 200K",
    "shrink TEACHER ": "shrink Qwen/Qwen2.5-1.5B-Instruct ",
    '"optim.learning_rate=[1e-5,3e-5]" ': '"optim.learning_rate=[1e-5,3e-5]" output=runs/grid ',
    "--shards 3/16 ": "--shards 1/2 record.output=part-1 ",
    "--output exports/first": "--output exports/first --max-kl 1",
    "--quantize q4_k_m": "--quantize q8_0",
}
"""What stands in place of a size, a placeholder or a folder that an earlier command has made."""

SERVED = ("served-teachers.md",)
"""Pages whose commands need a server; tests/teachers/test_served.py runs their recipes."""


def blocks(page):
    """Console blocks of a page, and the indented ones of those that have commands there."""
    text = (ROOT / page).read_text()
    found = [block.replace("\n$ ", "\n").removeprefix("$ ") for block in BLOCK.findall(text)]
    if page in ("README.md", "docs/tutorial.md"):
        shown = [re.sub(r"^    ", "", each, flags=re.M) for each in INDENTED.findall(text)]
        found += [each for each in shown if each.startswith(STARTS)]
        found.sort(key=lambda each: text.replace("\n    ", "\n").find(each.splitlines()[0]))
    return found


def commands_of(block):
    """Commands of a block, without the outputs that are shown."""
    lines = block.replace("\\\n", " ").splitlines()
    return [re.sub(r" +", " ", line) for line in lines if line.startswith(STARTS)]


def commands(page):
    return [command for block in blocks(page) for command in commands_of(block)]


PAGES = [
    p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
]


def runs(command):
    return not command.startswith(tuple(NOT_RUN))


def runnable():
    """Pages with commands that run here."""
    pages = [page for page in sorted(PAGES) if not page.endswith(SERVED)]
    return [page for page in pages if any(map(runs, commands(page)))]


def test_pages_with_commands_are_found_and_every_exception_is_used():
    assert {"README.md", "docs/tutorial.md", "docs/recording.md"} <= set(runnable())
    shown = [command for page in PAGES for command in commands(page)]
    assert len(shown) > 60
    unused = [each for each in NOT_RUN if not any(c.startswith(each) for c in shown)]
    unused += [each for each in INSTEAD if not any(each in f"{c} " for c in shown)]
    assert unused == []


def write_chat_model(folder, layers=26, seed=0):
    """A random model of many thin layers, which reads long rows and has a chat template."""
    tokenizer = small(template=CHATML)
    torch.manual_seed(seed)
    config = tiny_config("llama", layers, vocabulary=len(tokenizer), tie_word_embeddings=False)
    config.eos_token_id, config.max_position_embeddings = tokenizer.eos_token_id, 1024
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct")
MODELS += ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
TOP_K = {"type": "top_k", "k": 8}


def prepare(page, folder):
    """Everything the commands of a page refer to, tiny."""
    for seed, name in enumerate(MODELS):
        write_chat_model(folder / name, seed=seed)
    (folder / "src").symlink_to(ROOT / "src")
    for name, seed in (("train.jsonl", 1), ("heldout.jsonl", 2)):
        write_texts(folder / name, 40, seed)
    recipe = write_recipe(
        folder, output="runs/q1.5b", optim={"steps": 2}, objective={"temperature": 1.0}
    )
    tree = yaml.safe_load(recipe.read_text())
    tree["record"] = {"form": TOP_K, "output": "stores/q7b", "shard_tokens": 512}
    tree["teacher"]["path"] = tree["student"]["path"] = MODELS[0]
    if page == "docs/sequence-level.md":
        (folder / "data").mkdir()
        prompts = "".join(f'{{"prompt": "What boils? {n}"}}\n' for n in range(64))
        (folder / "data" / "prompts.jsonl").write_text(prompts)
        tree["data"] = {"path": "data/prompts.jsonl", "sequence_length": 64}
        tree["write"] = {"output": "data/written.jsonl", "tokens": 2, "truncated": "keep"}
        tree["objective"], tree["evaluate"] = {"alpha": 0.0}, {"data": None}
    recipe.write_text(json.dumps(tree))
    return FIRST.get(page, "")


RUN = "limbeck distill recipe.yaml\n"
MERGE = "limbeck record recipe.yaml --no-budget --shards 2/2 record.output=part-2\n"
OTHER = "limbeck distill recipe.yaml output=runs/jsd objective.divergence=jensen_shannon\n"
FIRST = {"docs/chat.md": RUN, "docs/export.md": RUN, "docs/recording.md": MERGE}
FIRST["README.md"] = OTHER
"""Commands that make what a page's own refer to."""

BETWEEN = "\nrm -rf student teacher-small stores/q7b\n"
"""Between blocks, which are alternatives where they make folders of the same name."""

SHIM = """#!/bin/sh
case "$1" in
  distill|check) set -- "$@" device=cpu evaluate.allow_worse_teacher=true;;
  forecast|record|write) set -- "$@" device=cpu;;
esac
exec {python} -m limbeck "$@"
"""
"""The command, with options for random weights."""


@pytest.mark.long
@pytest.mark.parametrize("page", runnable())
def test_the_commands_of_a_page_run_in_their_order(page, tmp_path):
    first = prepare(page, tmp_path)
    script = BETWEEN.join("\n".join(filter(runs, commands_of(b))) for b in blocks(page))
    for shown, tiny in INSTEAD.items():
        script = script.replace(shown, tiny)
    shim = tmp_path / "bin" / "limbeck"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "LIMBECK_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["sh", "-ex", "-c", first + script],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
