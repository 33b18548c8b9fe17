"""What terms on hidden states own lives with the student in a run, and not after it."""

import torch
from transformers import AutoModelForCausalLM

from limbeck.config import ObjectiveConfig
from limbeck.distributed import full_weights
from limbeck.models import save_student
from limbeck.train import train
from tests.models.tiny import tiny_tokenizer
from tests.train.test_loop import stop_after
from tests.train.toy import ALONE, fingerprint, latest, tensors, toy_pair, toy_setup

STATES = ObjectiveConfig(
    alpha=0.7,
    extra=(
        {"type": "hidden_state", "weight": 0.5, "loss": "cosine"},
        {"type": "relations", "weight": 0.5, "layer_map": "last"},
        {"type": "cka", "weight": 0.3, "layer_map": "uniform"},
        {"type": "attention_relations", "weight": 0.2, "heads": 2},
    ),
)


def test_projectors_are_trained_and_resume_to_the_same_bits(tmp_path):
    train(toy_setup(tmp_path / "whole", pair=toy_pair(STATES)))
    stop_after(tmp_path / "stopped", 9, pair=toy_pair(STATES))
    train(toy_setup(tmp_path / "stopped", pair=toy_pair(STATES), resume=True))
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    saved = tensors(latest(tmp_path / "whole" / "checkpoints"))
    names = [name for name in saved if "projectors" in name]
    weights = [name for name in names if saved[name].shape == (24, 16)]
    assert len(weights) >= 2
    first, _ = toy_pair(STATES)
    start = first.state_dict()["objective.state_terms.hidden_state.projectors.0.weight"]
    assert all((saved[name] - start).abs().max() > 1e-3 for name in weights if ".0." in name)


def test_projectors_are_no_part_of_the_student_that_is_saved(tmp_path):
    distiller, _ = toy_pair(STATES)
    weights = full_weights(distiller.student.hf_model, ALONE)
    save_student(distiller.student, tiny_tokenizer(37), tmp_path, weights=weights)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not any("projector" in name for name in opened.state_dict())
    batch = torch.arange(6)[None]
    torch.testing.assert_close(
        opened(batch).logits, distiller.student.hf_model(batch).logits, atol=0, rtol=0
    )
