"""A teacher whose weights are in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from limbeck.batch import Batch
from limbeck.distributed import (
    World,
    abandon_pass,
    broadcast_object,
    gather_root,
    model_for,
    release,
    require_same_files,
    shard,
)
from limbeck.errors import ConfigError
from limbeck.files import size
from limbeck.losses import Head, SignalNeeds, TeacherSignal
from limbeck.losses.distributions import LazyLogits
from limbeck.losses.head.likelihood import with_likelihoods
from limbeck.models import (
    Bits,
    CausalLM,
    ModelSource,
    PreTrainedTokenizerBase,
    captured_projections,
    choose_dtype,
    load_model,
    loading_notes,
    model_facts,
    num_bytes,
    quantized,
    require_bitsandbytes,
    shape_facts,
    weights_fingerprint,
)
from limbeck.teachers.base import (
    DISTRIBUTION,
    NOTHING,
    Teacher,
    TeacherInfo,
    TeacherRequest,
    teachers,
)
from limbeck.tokenizers import load_tokenizer


class LocalTeacher(Teacher):
    """A frozen model that runs beside the student; the only teacher with weights here.

    Attributes:
        model: In eval mode, without gradients.
        whole: Loads the model on the CPU as it was before it was quantised; None if it was not.
    """

    gives_likelihoods = True

    def __init__(
        self,
        model: CausalLM,
        needs: SignalNeeds = DISTRIBUTION,
        *,
        info: TeacherInfo | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        whole: Callable[[], CausalLM] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """
        Args:
            model: The teacher. It is put in eval mode and its gradients are switched off.
            needs: What every signal must hold.
            info: Its name, hash and shape; the shape alone by default.
            tokenizer: Its tokenizer, if anything will ask for it.
            whole: See the class.
            fingerprint: Of its weight files, if each of several ranks has loaded all of them.
        """
        self.whole = whole
        self._fingerprint = fingerprint
        self.model = model.eval().requires_grad_(False)
        self._info = info or TeacherInfo.from_json(
            {**shape_facts(model), "max_positions": model.max_positions}
        )
        self._tokenizer = tokenizer
        self.require(TeacherRequest(needs=needs))

    @property
    def info(self) -> TeacherInfo:
        """Name, commit, hash and shape of the model."""
        return self._info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer it was made with."""
        assert self._tokenizer is not None, "this teacher was made without a tokenizer"
        return self._tokenizer

    @property
    def head(self) -> Head:
        """The model's head, over the shared vocabulary; gathered after `restore`."""
        return self.model.head

    def require(self, request: TeacherRequest) -> None:
        """Check that the layers exist, and cut the head to the shared vocabulary.

        Raises:
            ConfigError: The model does not have a layer that is read.
        """
        read = request.needs.layers | request.needs.projections
        if absent := sorted(i for i in read if not 0 <= i < self.model.num_layers):
            raise ConfigError(
                f"The teacher has layers 0 to {self.model.num_layers - 1}, but the objective "
                f"reads layers {absent}. Correct the layer_map of the term that reads them."
            )
        if request.vocabulary_size is not None:
            self.model.vocabulary_size = request.vocabulary_size
        self._needs = request.needs

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """Last hidden states with the head, and the chosen layers, of one forward pass."""
        needs = self._needs
        if needs == NOTHING:
            return TeacherSignal()
        with captured_projections(self.model, batch, needs.projections) as projections:
            hidden, layer_hidden = self.model(batch, sorted(needs.layers))
        head = self.model.head
        distribution = LazyLogits(hidden, head) if needs.distribution else None
        signal = TeacherSignal.from_distribution(distribution, layer_hidden, projections)
        if not needs.likelihoods:
            return signal
        return with_likelihoods(signal, hidden, head, batch.targets())

    @property
    def notes(self) -> tuple[str, ...]:
        """That it is quantised, or was loaded whole where it should have been read by rows."""
        if self._info.quantized is not None:
            return (
                f"teacher: quantised to {self._info.quantized}, {size(num_bytes(self.model))}, on "
                "each rank whole; limbeck check shows what that costs.",
            )
        return loading_notes("teacher", self.model)

    def release(self) -> None:
        """Shard embedding and head again, which `signal` leaves gathered for the loss."""
        release(self.model)

    def restore(self) -> None:
        """Gather embedding and head again, in the memory that earlier signals refer to."""
        gather_root(self.model)

    def abandon_pass(self) -> None:
        """Let go of the weights that a failed pass gathered."""
        abandon_pass(self.model)

    def shard(self, world: World) -> None:
        """Spread the model over the ranks, unless it is quantised; it computes in its own type.

        Raises:
            DataError: Other ranks have loaded other weights.
        """
        if self._fingerprint is not None:
            require_same_files(self._fingerprint, self.model.family, world)
        if self.whole is None:
            shard(self.model, self.model.blocks, world)
        shared_hash = broadcast_object(self._info.weights_sha256, world)
        self._info = replace(self._info, weights_sha256=shared_hash)


def find_local(teacher: Teacher) -> LocalTeacher | None:
    """The teacher if its weights are in this process."""
    return teacher if isinstance(teacher, LocalTeacher) else None


def require_local(teacher: Teacher, purpose: str) -> LocalTeacher:
    """The teacher, whose weights must be in this process.

    Args:
        purpose: What needs the weights, as the subject of the message.
    """
    if isinstance(teacher, LocalTeacher):
        return teacher
    raise ConfigError(
        f"{purpose} needs the weights of the teacher's model, and a teacher that is stored, runs "
        "elsewhere or is made of several has no model of its own in this process. Name one: "
        "teacher='{type: online, path: ...}'."
    )


@teachers.register("online")
def online(
    world: World,
    *,
    path: str,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: Bits | None = None,
) -> LocalTeacher:
    """A model that runs beside the student: nothing to record, one more forward pass a step.

    Args:
        path: Folder, GGUF file or Hub name of a causal language model.
        dtype: Format of its weights: `float32`, `bfloat16`, `float16` or `float64`; `auto` takes
            bfloat16 on CUDA devices that have it, and float32 elsewhere.
        revision: Commit, tag or branch of a model on the Hub.
        trust_remote_code: Run Python code that comes with the model.
        quantize: Keep the linear layers of its blocks in `8bit` (int8) or `4bit` (NF4), through
            bitsandbytes; each rank then has the whole teacher.
    """
    source = ModelSource(path, revision, trust_remote_code)
    weights = choose_dtype(dtype, world.device)
    if quantize is not None and world.simulated:
        raise ConfigError(
            "teacher.quantize: a plan for a cluster reads no weights and cannot quantise them, got "
            f"{quantize}. Add teacher.quantize=null to plan the teacher in {dtype}."
        )
    if quantize is not None:
        require_bitsandbytes("teacher.quantize")  # before a large model is read for nothing
    whole = partial(load_model, source, device=torch.device("cpu"), dtype=weights)
    model = model_for(source, world, weights) if quantize is None else whole()
    facts = {
        **model_facts(source, model, hashed=world.reads_files),
        "max_positions": model.max_positions,
    }
    is_copied = world.size > 1 and not world.simulated and model.weight_files is None
    if quantize is not None:
        model = quantized(model, quantize, world.device)
        facts |= {"quantized": quantize, "bytes": num_bytes(model)}
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    return LocalTeacher(
        model,
        info=TeacherInfo.from_json(facts),
        tokenizer=tokenizer,
        whole=None if quantize is None else whole,
        fingerprint=weights_fingerprint(source) if is_copied else None,
    )
