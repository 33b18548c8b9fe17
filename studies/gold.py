"""TRL's GOLD beside the objectives of cross_tokenizer.py, on the same student, teacher and rows.

    python studies/cross_tokenizer.py --output runs/cross_tokenizer --trials root_kl_0.5
    python studies/gold.py --output runs/cross_tokenizer

Needs TRL 1.16. GOLD (General Online Logit Distillation) is trained without generation (`lmbda` 0),
on the rows and with the optimizer of the recipe of the study's `cross_entropy-SEED`, and measured
on its held-out tokens. What differs from a run of limbeck:

- GOLD needs prompts and completions. The text of a window's first token is the prompt, the rest is
  the completion. Both tokenizers read this text again. GOLD adds an end token to every window;
  its distillation leaves it out, its cross-entropy counts it.
- GOLD cannot pack. A row's windows are a batch, and each counts the same whatever its length.
- Tokenizers must be byte-level: GOLD refuses the study's Unigram student.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cross_tokenizer import BASE, rows_of, table
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trials import publish
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from limbeck import Run, assemble, load
from limbeck.evaluate.scores import Scores
from limbeck.experiment.score_files import TrialScores, read_scores, write_scores
from limbeck.experiment.trials import fidelities
from limbeck.models import ModelSource, load_model

HYBRID = {
    "uld_use_hybrid_loss": True,
    "uld_hybrid_matched_weight": 0.6,
    "uld_hybrid_unmatched_weight": 0.4,
}
"""The weights of the example in TRL's documentation."""

TRIALS: dict[str, dict[str, Any]] = {
    "gold": {},
    "gold_hybrid": HYBRID,
    "gold_hybrid_bayesian_ce_0.5": HYBRID
    | {
        "uld_token_merge_strategy": "bayesian",
        "uld_distillation_weight": 0.5,
        "uld_crossentropy_weight": 0.5,
    },
}
"""What is set besides `use_uld_loss`. TRL's defaults: extended alignment, probabilities merged as
"observed", sorted probabilities compared, both temperatures 1, cross-entropy 0, distillation 1."""


def examples(run: Run) -> Iterator[list[dict[str, str]]]:
    """The windows of each step of a run, as prompts and completions."""
    source, tokenizer = run.parts.source(None), run.parts.tokenizer
    for step in range(run.config.optim.num_steps):
        texts = []
        for batch in source.step(step, run.world).cut(1):
            for _, _, window in batch.scored_windows():
                ids = window.tokens.tolist()
                rest = ids[1:-1] if ids[-1] == tokenizer.eos_token_id else ids[1:]
                prompt, completion = (str(tokenizer.decode(each)) for each in (ids[:1], rest))
                texts.append({"prompt": prompt, "completion": completion})
        yield texts


def settings(run: Run, folder: Path, trial: str) -> GOLDConfig:
    """GOLD's configuration, with the optimizer of a run's recipe."""
    optim = run.config.optim
    return GOLDConfig(
        output_dir=str(folder / "trainer"),
        use_uld_loss=True,
        lmbda=0.0,
        teacher_tokenizer_name_or_path=teacher_of(run),
        max_length=2 * run.config.data.sequence_length,  # no window is cut
        max_steps=optim.num_steps,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.num_warmup_steps,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        max_grad_norm=optim.max_grad_norm,
        seed=run.config.seed,
        use_cpu=run.world.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **TRIALS[trial],
    )


def teacher_of(run: Run) -> str:
    """The folder of the teacher that the recipe's cross-tokenizer teacher wraps."""
    return str(run.config.teacher["teacher"]["path"])


def train(run: Run, folder: Path, trial: str) -> None:
    """Train the recipe's student with GOLD, and save it with its losses."""
    start = str(run.config.student["path"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (start, teacher_of(run))
    )
    steps = list(examples(run))
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=settings(run, folder, trial),
        train_dataset=Dataset.from_list([text for texts in steps for text in texts]),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    numbers = iter(range(len(trainer.train_dataset)))
    batches = [[next(numbers) for _ in texts] for texts in steps]
    # GOLD's own sampler shuffles, and its batches hold equal numbers of examples
    trainer.get_train_dataloader = lambda: DataLoader(
        trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator
    )
    trainer.train()
    trainer.save_model(str(folder / "student"))
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def scores_of(trial: str, seed: int, options: argparse.Namespace) -> tuple[Scores, Scores]:
    """Test scores of cross-entropy and of a trial, which is trained unless it is done."""
    base, folder = options.output / f"{BASE}-{seed}", options.output / "gold" / f"{trial}-{seed}"
    path = folder / "scores.json"
    if not path.exists():
        changes = [f"output={folder}", f"student.path={options.output / 'student'}"]
        if options.teacher:
            changes.append(f"teacher.teacher.path={options.teacher}")
        with assemble(load(base / "recipe.yaml", changes)) as run:
            train(run, folder, trial)
            source = ModelSource(str(folder / "student"))
            model = load_model(source, device=run.world.device, dtype=torch.float32)
            model.vocabulary_size = run.parts.vocabulary.size
            fidelity, _ = fidelities(run.parts)
            assert fidelity is not None, "the recipe names held-out text"
            write_scores(path, TrialScores(test=fidelity.test(model)))
    reference, own = (read_scores(each).test for each in (base / "scores.json", path))
    assert reference is not None, "the recipe names held-out text"
    assert own is not None, "it was written above"
    assert (reference.documents == own.documents).all(), "scores are paired by document"
    return reference, own


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="of a study that was run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--teacher", type=Path, help="a folder; the recipe's by default")
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    return parser.parse_args()


def main() -> None:
    """Train the trials that are missing, and write gold/results.json and gold/results.md."""
    options = arguments()
    scores: dict[str, list[Scores]] = {name: [] for name in (BASE, *options.trials)}
    for seed in options.seeds:
        for name in options.trials:
            base, own = scores_of(name, seed, options)
            scores[name].append(own)
        scores[BASE].append(base)
        rows = rows_of(scores)
        publish(options.output / "gold", rows, table(rows))


if __name__ == "__main__":
    main()
