"""Weights read from their files into the shards of a model, each rank its own rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from limbeck.distributed.ranks import World, gather_objects, together
from limbeck.errors import DataError
from limbeck.models import (
    CausalLM,
    ModelSource,
    load_model,
    open_model,
    prove_documents_apart,
    prove_head,
    sketched_model,
)


def model_for(source: ModelSource, world: World, dtype: torch.dtype) -> CausalLM:
    """A causal LM for these ranks: on the meta device until it is sharded, else loaded.

    On simulated ranks it has shapes only, and its files need hold no weights.

    Args:
        source: Of the model.
        world: The ranks it will be sharded over; without a mesh it is loaded whole.
        dtype: Of its weights.
    """
    if world.simulated:
        return sketched_model(source, dtype)
    if world.mesh is None:
        return load_model(source, device=world.device, dtype=dtype)
    return open_model(source, device=world.device, dtype=dtype)


def unfilled(module: nn.Module) -> list[CausalLM]:
    """The models in a module whose weights are still in their files."""
    return [
        each
        for each in module.modules()
        if isinstance(each, CausalLM) and each.weight_files is not None
    ]


def fill(model: CausalLM, world: World) -> None:
    """Give memory to a model on the meta device, and read every rank's rows of its weights.

    Memory: the rank's shards, and rows of `STEP_BYTES` on the way. Every rank calls it.

    Args:
        model: With `weight_files`; sharded, or whole in a single process.
        world: The ranks.

    Raises:
        DataError: A file is damaged, holds numbers that are not finite, or is not the same on all
            machines.
    """
    files = model.weight_files
    assert files is not None, "a model with weights needs none"
    require_same_files(files.fingerprint(), model.family, world)
    give_memory(model.hf_model, world.home)
    tensors = dict(model.hf_model.named_parameters()) | dict(model.hf_model.named_buffers())

    def read() -> None:
        for name in files.tensors:
            rows, first_row = own_rows(tensors[name].detach())
            if bad := files.read(name, rows, first_row):
                raise DataError(
                    f"Weights must be finite numbers, but {name} of this {model.family} model "
                    f"holds {bad:,} that are not. Fetch or save the model again."
                )

    together(read, world)
    model.weight_files = None


def require_same_files(fingerprint: str, family: str, world: World) -> None:
    """Refuse ranks that read other weights of a model; every rank calls it.

    Raises:
        DataError: On every rank, with the first rank that differs from rank 0.
    """
    first, *others = gather_objects(fingerprint, world)
    if different := [rank for rank, other in enumerate(others, 1) if other != first]:
        raise DataError(
            f"Every rank must read the same weights of this {family} model, but the files of rank "
            f"{different[0]} are not those of rank 0. Copy them again to that machine."
        )


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Replace every parameter by one with memory; tied ones stay one, and buffers as they are."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if old not in made:
            empty = torch.empty_like(old, device=device)
            made[old] = nn.Parameter(empty, requires_grad=old.requires_grad)
        parent, _, own_name = name.rpartition(".")
        module.get_submodule(parent).register_parameter(own_name, made[old])


def prove(model: CausalLM) -> None:
    """The checks of `load_model`, inside `gathered`."""
    prove_head(model)
    prove_documents_apart(model)


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that are on this rank, and the number of the first of them."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    first = 0
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):  # as torch.chunk divides
            assert placement.dim == 0, "FSDP2 shards rows by default"
            chunk = -(-tensor.shape[0] // tensor.device_mesh.size(axis))
            first = min(tensor.device_mesh.get_local_rank(axis) * chunk, tensor.shape[0])
    return tensor.to_local(), first
