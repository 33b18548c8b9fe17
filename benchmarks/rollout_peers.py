"""Time and memory of an on-policy step, beside TRL's DistillationTrainer.

    python benchmarks/rollout_peers.py --teacher FOLDER [--rows 8] [--prompt 32] [--tokens 64]

SmolLM2-135M-Instruct or another Llama-like teacher, a cut of its middle layers as student, reverse
KL over the whole vocabulary, AdamW, float32, no activation checkpointing. Prompts are pieces of
`docs/`, all of one length; no text ends before `--tokens`. The two take turns in one process:
medians of writing, of the teacher's forward pass (scoring), and of the rest of the step (learning).
Peak memory: each in a process of its own, above what the two models take. Needs TRL (`make bench`
installs it).
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from head.measure import resident_mb
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from limbeck.config import ObjectiveConfig, OptimConfig
from limbeck.distributed import World
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller, ModelSource, load_model
from limbeck.rollouts import Rollouts, Sampling
from limbeck.teachers import LocalTeacher
from limbeck.train import make_optimizers, train_step

CPU = torch.device("cpu")
WARM_UP = 1
RATE = 1e-6
PARTS = ("writing", "scoring", "learning", "step")
CPU_TIME = "CPU "
"""Before the name of a part: its processor time, which other work on the machine changes less."""
Seconds = dict[str, float]


class Stopwatch:
    """Seconds of the named parts of the present step."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - wall, time.process_time() - cpu)

    def add(self, name: str, wall: float, cpu: float) -> None:
        for clock, seconds in (("", wall), (CPU_TIME, cpu)):
            self.seconds[clock + name] = self.seconds.get(clock + name, 0.0) + seconds

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return work(*args, **kwargs)

        return wrapped

    def taken(self) -> Seconds:
        """The step's parts; what is neither writing nor scoring is learning."""
        found, self.seconds = self.seconds, {}
        learning = {
            clock + "learning": found[clock + "step"]
            - found[clock + "writing"]
            - found[clock + "scoring"]
            for clock in ("", CPU_TIME)
        }
        return found | learning


def cut_student(teacher: Path, layers: int, folder: Path) -> None:
    """A copy of the teacher without its middle layers."""
    model = cast(Any, AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32))
    blocks, drop = list(model.model.layers), len(model.model.layers) - layers
    first = (len(blocks) - drop) // 2
    kept = [*blocks[:first], *blocks[first + drop :]]
    for index, block in enumerate(kept):
        block.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = layers
    model.generation_config.eos_token_id = None  # every text has its full length
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def prompts_of(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Pieces of the documentation that are tokens of one length again after decoding."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    ids = [token for page in pages for token in tokenizer(page.read_text())["input_ids"]]
    pieces = (ids[at : at + length] for at in range(0, len(ids) - length, length))
    same = [piece for piece in pieces if tokenizer(tokenizer.decode(piece))["input_ids"] == piece]
    assert len(same) >= count, f"{len(same)} prompts for {count}"
    return same[:count]


class Ours:
    """limbeck's step: Rollouts, a local teacher, the fused head, AdamW."""

    def __init__(self, options: Any, student: Path, prompts: list[list[int]], folder: Path):
        self._watch = Stopwatch()
        model, teacher = (
            load_model(ModelSource(str(path)), device=CPU, dtype=torch.float32)
            for path in (student, options.teacher)
        )
        config = ObjectiveConfig(alpha=1.0, divergence="reverse_kl")
        depths, width = (model.num_layers, teacher.num_layers), model.config.hidden_size
        layer_map = LayerMap.uniform(*depths)
        objective = build_objective(
            config, PairShapes(*depths, width, width, layer_map), head_budget_mb="auto"
        )
        self._distiller = Distiller(model, objective).train()
        self._teacher = LocalTeacher(teacher, objective.needs)
        self._teacher.signal = self._watch.timed("scoring", self._teacher.signal)  # type: ignore
        optim = OptimConfig(learning_rate=RATE, steps=10)
        self._optimizers = make_optimizers(self._distiller, optim, RATE, CPU)
        self._rows, self._tokens = options.rows, options.tokens
        self._source = Rollouts(
            model,
            prompts,
            Sampling(tokens=options.tokens),
            seed=0,
            rows_per_step=options.rows,
            folder=folder,
        )
        self._world, self._number = World(0, 1, CPU), 0

    def step(self) -> Seconds:
        with self._watch.part("step"):
            with self._watch.part("writing"):
                data = self._source.step(self._number, self._world)
            batches, self._number = data.cut(self._rows), self._number + 1
            assert sum(b.num_scored() for b in batches) == self._rows * self._tokens
            optimizers = self._optimizers
            train_step(
                self._distiller, self._teacher, optimizers, batches, self._world, max_grad_norm=1.0
            )
        return self._watch.taken()


class Theirs(TrainerCallback):
    """TRL's step, timed from inside its training loop."""

    def __init__(
        self,
        options: Any,
        student: Path,
        prompts: list[list[int]],
        folder: Path,
        after: Callable[[Seconds], None],
    ):
        """
        Args:
            after: Called between two steps, with the seconds of the first.
        """
        self._watch, self._after, self._started = Stopwatch(), after, (0.0, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(student)
        models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            for path in (student, options.teacher)
        ]
        self.trainer = DistillationTrainer(
            model=models[0],
            teacher_model=models[1],
            args=DistillationConfig(
                output_dir=str(folder / "trl"),
                beta=1.0,
                learning_rate=RATE,
                max_steps=WARM_UP + options.steps,
                per_device_train_batch_size=options.rows,
                max_completion_length=options.tokens,
                generation_kwargs={"eos_token_id": None},
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                shuffle_dataset=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(p) for p in prompts]}),
            processing_class=tokenizer,
            callbacks=[self],
        )
        trainer = cast(Any, self.trainer)
        trainer.eos_token_ids = [-1]
        self._expected = (options.rows, options.prompt + options.tokens)
        written, hidden = trainer._generate_and_score_completions, trainer._get_last_hidden_state
        trainer._generate_and_score_completions = self._watch.timed("writing", written)

        def last_hidden_state(model: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
            assert tuple(ids.shape) == self._expected, ids.shape
            if model is trainer.teacher_model:
                with self._watch.part("scoring"):
                    return hidden(model, ids, *args, **kwargs)
            return hidden(model, ids, *args, **kwargs)

        trainer._get_last_hidden_state = last_hidden_state

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wall, cpu = self._started
        self._watch.add("step", time.perf_counter() - wall, time.process_time() - cpu)
        self._after(self._watch.taken())


def memory_of(form: str, options: Any, student: Path, prompts: Any, folder: Path) -> float:
    """Peak MB of two steps above the resident set with both models loaded."""
    before = 0.0

    def start() -> None:
        nonlocal before
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident_mb("VmRSS")

    if form == "limbeck":
        ours = Ours(options, student, prompts, folder)
        start()
        ours.step()
        ours.step()
    else:
        theirs = Theirs(options, student, prompts, folder, lambda seconds: None)
        start()
        theirs.trainer.train()
    return resident_mb("VmHWM") - before


def table(options: Any, found: dict[str, list[Seconds]], memory: dict[str, float]) -> str:
    rows = options.rows
    lines = [
        f"{datetime.date.today()}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; "
        f"{rows} rows of {options.prompt} + {options.tokens} tokens, student of {options.layers} "
        f"layers, float32; medians of {options.steps} steps.",
        "",
        f"| seconds | {' | '.join(PARTS)} | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for clock in ("", CPU_TIME):
        for form, steps in found.items():
            numbers = [f"{statistics.median(s[clock + name] for s in steps):.2f}" for name in PARTS]
            lines.append(f"| {clock}{form} | {' | '.join(numbers)} | {memory[form]:.0f} |")
        pairs = list(zip(found["limbeck"], found["TRL"], strict=True))
        ratios = [statistics.median(a[clock + n] / b[clock + n] for a, b in pairs) for n in PARTS]
        share = memory["limbeck"] / memory["TRL"]
        lines.append(f"| {clock}ratio | {' | '.join(f'{r:.2f}' for r in ratios)} | {share:.2f} |")
    return "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file that gets the table, at its end")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student = Path(options.memory_of[1]) if options.memory_of else folder / "student"
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        count = options.rows * (WARM_UP + options.steps)
        prompts = prompts_of(tokenizer, count, options.prompt)
        if options.memory_of:
            print(memory_of(options.memory_of[0], options, student, prompts, folder))
            return
        cut_student(options.teacher, options.layers, student)
        found: dict[str, list[Seconds]] = {"limbeck": [], "TRL": []}
        ours = Ours(options, student, prompts, folder)

        def after(seconds: Seconds) -> None:
            found["TRL"].append(seconds)
            found["limbeck"].append(ours.step())
            print(f"TRL {seconds}\nlimbeck {found['limbeck'][-1]}", flush=True)

        Theirs(options, student, prompts, folder, after).trainer.train()
        memory = {}
        for form in found:
            arguments = [*sys.argv, "--memory-of", form, str(student), "--steps", "1"]
            done = subprocess.run(
                [sys.executable, *arguments], check=True, capture_output=True, text=True
            )
            memory[form] = float(done.stdout.split()[-1])
    result = table(options, {form: steps[WARM_UP:] for form, steps in found.items()}, memory)
    print(result)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write("\n" + result)


if __name__ == "__main__":
    main()
