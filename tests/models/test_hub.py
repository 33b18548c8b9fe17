"""Models of the hub: how often it is asked for them, and what is done when it refuses."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from limbeck.errors import TryLaterError
from limbeck.models import ModelSource, load_model, model_facts, open_model
from limbeck.tokenizers import hub
from tests.models.tiny import tiny_llama, tiny_tokenizer
from tests.tokenizers.local_hub import local_hub

NAME = "limbeck-tests/three-files"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with a model of three files and more, and an empty cache."""
    folder = tmp_path / "model"
    tiny_llama(3, 32).hf_model.save_pretrained(folder, max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "ANSWERED", set(), raising=False)
    with local_hub(folder) as server:
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def opened():
    source, device = ModelSource(NAME), torch.device("cpu")
    model = open_model(source, device=device, dtype=torch.float32)
    assert model.weight_files is not None
    assert Path(next(iter(model.weight_files.tensors.values()))[0]).exists()
    return model_facts(source, model)


def test_the_hub_is_asked_once_for_a_model_of_any_number_of_files(served):
    opened()
    opened()
    assert served.asked == 1


def test_a_hub_with_too_many_requests_does_not_keep_a_cached_model_from_loading(
    served, monkeypatch
):
    facts = opened()
    monkeypatch.setattr(hub, "ANSWERED", set(), raising=False)  # as in another process
    served.is_busy = True
    assert opened() == facts


def test_a_model_that_is_not_cached_can_be_tried_again_when_the_hub_is_busy(served):
    served.is_busy = True
    with pytest.raises(TryLaterError, match=r"not in the local cache.*out of reach or busy"):
        load_model(ModelSource(NAME), device=torch.device("cpu"), dtype=torch.float32)
