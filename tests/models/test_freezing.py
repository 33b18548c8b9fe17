"""Parts of a student that stay as they are."""

import pytest

from limbeck.config.trainable import TrainableConfig
from limbeck.errors import ConfigError
from limbeck.models.freezing import freeze, make_trainable, parts_of, trained_facts
from tests.models.tiny import FAMILIES, tiny_model


def frozen(model):
    return {n for n, p in model.hf_model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_belongs_to_one_part(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    parts = parts_of(model)
    count = sum(p.numel() for parameters in parts.values() for p in parameters)
    assert count == model.num_parameters
    wanted = {"embeddings", "norms", "attention", "feed_forward"}
    has_head = not tied or family == "phi"  # whose head has a bias of its own
    assert parts.keys() == (wanted | {"head"} if has_head else wanted)
    (_, *more) = parts["embeddings"]
    assert bool(more) == (family == "gpt2"), "which has one of positions too"


def test_what_is_named_is_frozen_and_nothing_else():
    model = tiny_model("llama", 3, tie_word_embeddings=False)
    freeze(model, ("embeddings", "norms", "layers.0-1"))
    rest = {n for n, p in model.hf_model.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in rest
    assert all(n == "lm_head.weight" or n.startswith("model.layers.2.") for n in rest)
    assert not any("norm" in n for n in rest)
    assert len(rest) == 8


def test_a_tied_weight_is_frozen_under_both_names():
    model = tiny_model("llama", tie_word_embeddings=True)
    freeze(model, ("head", "embeddings"))
    assert frozen(model) == {"model.embed_tokens.weight"}


def test_facts_say_how_much_is_trained_and_what_the_rest_is():
    config = TrainableConfig(freeze=("layers.1",))
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    whole = trained_facts(model, TrainableConfig())
    assert whole == {"parameters": model.num_parameters, "of": model.num_parameters}
    make_trainable(model, config, 0)
    make_trainable(other, config, 0)
    facts, others = trained_facts(model, config), trained_facts(other, config)
    assert facts["parameters"] == facts["of"] - sum(p.numel() for p in model.blocks[1].parameters())
    assert facts["frozen_parts"] == ["layers.1"]
    assert facts["frozen_sha256"] != others["frozen_sha256"]


@pytest.mark.parametrize(
    ("parts", "tied", "message"),
    [
        (("embeddings",), True, "embeddings and head of this llama student are one weight"),
        (
            ("norms", "layers.1-2"),
            False,
            r"freeze\[1\].*has embeddings, head, norms, attention, feed_forward and layers\.0-1, "
            r"got 'layers\.1-2'",
        ),
        (("layers.1-0",), False, r"freeze\[0\].*got 'layers\.1-0'"),
        (
            ("embeddings", "head", "norms", "layers.0-1"),
            False,
            "something must be left to train",
        ),
    ],
)
def test_parts_that_are_not_there_are_refused(parts, tied, message):
    with pytest.raises(ConfigError, match=message):
        freeze(tiny_model("llama", tie_word_embeddings=tied), parts)
