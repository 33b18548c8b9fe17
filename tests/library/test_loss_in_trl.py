"""The page's trainer of TRL, run as it stands, against plain full logits; skipped without TRL."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from limbeck.losses import DistillationLoss
from tests.library.test_loss_library import TRL, VOCABULARY, texts, tiny, together, train_plainly


def tokenizer() -> PreTrainedTokenizerFast:
    """One that TRL can hold; nothing is tokenized here."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "eos_token": "w1", "pad_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def collate(rows):
    batch = together(rows)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_trl_trains_as_full_logits_do(tmp_path):
    """Three steps of two micro-batches of unequal numbers of scored tokens."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    space = {"torch": torch}
    exec(TRL, space)
    student, teacher, rows = tiny(1, 1, 8), tiny(2, 2, 16), texts(4)
    other = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    arguments = gkd.GKDConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        max_grad_norm=0.0,
        lmbda=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = space["LimbeckGKDTrainer"](
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_list(rows).with_format("torch"),
        data_collator=collate,
        processing_class=tokenizer(),
        optimizers=(optimizer, constant),
        distillation=DistillationLoss(alpha=0.9, temperature=2.0),
    )
    trainer.train()
    plain = torch.optim.SGD(other.parameters(), lr=0.5)
    train_plainly(other, teacher, [together(rows)] * 3, plain)
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert (student.lm_head.weight - tiny(1, 1, 8).lm_head.weight).abs().max() > 1e-2
