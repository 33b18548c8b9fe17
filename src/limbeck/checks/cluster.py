"""The plan of a run on devices that are not here, from one simulated step and stated figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from limbeck.checks.hardware import Hardware
from limbeck.checks.plan import Cluster, Fix, Plan, plan_disk, state_bytes
from limbeck.checks.proof import Proof
from limbeck.config import RunConfig
from limbeck.distributed import Collective, StepFootprint
from limbeck.files import size
from limbeck.models import CausalLM, Distiller

RESERVED_BYTES = 3 << 30
"""Guess of what CUDA, NCCL and cuBLAS take on a device."""
FRAGMENTS = 0.1
"""Guess of the part of the tensors that the allocator holds beyond them."""
COMPUTE_SHARE = 0.4
"""Assumed part of the stated FLOP/s that a step reaches."""
LINK_SHARE = 0.75
"""Assumed part of the stated bandwidth that collectives reach."""


def margin_bytes(peak_bytes: int) -> int:
    """Memory of a device beyond its tensors: a guess, not measured on a device."""
    return RESERVED_BYTES + int(FRAGMENTS * peak_bytes)


def fits(peak_bytes: int, hardware: Hardware) -> bool:
    """Whether tensors fit into a device, with the margin."""
    return peak_bytes + margin_bytes(peak_bytes) <= hardware.memory_bytes


def cluster_plan(
    distiller: Distiller,
    teachers: Sequence[CausalLM],
    config: RunConfig,
    step: StepFootprint,
    hardware: Hardware,
    *,
    ranks: int,
    micro_batch: int,
    students: int,
) -> Plan:
    """The plan of a run on a cluster."""
    rows = config.optim.rows_per_step(config.data.sequence_length)
    compute = step.flops / (hardware.tflops * 1e12 * COMPUTE_SHARE)
    sending = sum(seconds(each, hardware) for each in step.collectives)
    tokens = rows * config.data.sequence_length
    step_seconds = max(compute, sending)
    return Plan(
        parameters={
            "teacher": sum(teacher.num_parameters for teacher in teachers),
            "student": distiller.student.num_parameters,
        },
        trained_parameters=sum(p.numel() for p in distiller.parameters() if p.requires_grad),
        memory_bytes=dict(sorted(step.memory_bytes.items(), key=lambda pair: -pair[1])),
        free_memory_bytes=hardware.memory_bytes,
        disk=plan_disk(distiller, config, state_bytes(distiller, config.optim), students),
        micro_batch=micro_batch,
        micro_batches_per_step=passes_of_a_rank(rows, ranks, micro_batch),
        steps=config.optim.num_steps,
        passes_over_text=None,
        students=students,
        tokens_per_second=tokens / step_seconds,
        seconds=step_seconds * config.optim.num_steps * students,
        host_bytes=step.host_bytes,
        cluster=Cluster(
            ranks=ranks,
            hardware=hardware,
            margin_bytes=margin_bytes(step.peak_bytes),
            collectives=step.collectives,
            flops=step.flops,
            compute_seconds=compute,
            communication_seconds=sending,
            slowest_tokens_per_second=tokens / (compute + sending),
            idle_ranks=max(ranks - rows, 0),
        ),
    )


def passes_of_a_rank(rows: int, ranks: int, micro_batch: int) -> int:
    """Micro-batches of the rank that has most rows of a step."""
    most = -(-rows // ranks)
    return -(-most // micro_batch)


def seconds(collective: Collective, hardware: Hardware) -> float:
    """Time of collectives on a ring, at `LINK_SHARE` of the stated bandwidth."""
    ways = 2 if collective.kind == "all-reduce" else 1
    sent = ways * collective.whole_bytes * (collective.ranks - 1) / collective.ranks
    return sent / (hardware.bytes_per_second(collective.ranks, collective.stride) * LINK_SHARE)


def cluster_findings(plan: Plan) -> list[Proof]:
    """Whether memory suffices and every rank has work."""
    cluster = plan.cluster
    assert cluster is not None, "a plan of a cluster"
    peak = sum(plan.memory_bytes.values())
    room = cluster.hardware.memory_bytes
    needed = f"{size(peak)} of tensors and {size(cluster.margin_bytes)} of margin"
    holds = peak + cluster.margin_bytes <= room
    return [
        Proof(
            "memory",
            holds,
            f"{needed} of {size(room)} on a rank" + "".join(advice(cluster.fixes)),
            "the step fits into each device; the margin is a guess (3 GiB + 10 %)",
            decides=peak > room,
        ),
        Proof(
            "ranks at work",
            not cluster.idle_ranks,
            f"{cluster.idle_ranks} of {cluster.ranks} ranks have no row in a step",
            "raise optim.tokens_per_step, or use fewer ranks, if some have none",
            decides=False,
        ),
    ]


def advice(fixes: Sequence[Fix]) -> Iterator[str]:
    """What changes of the recipe lead to."""
    for fix in fixes:
        verdict = "fits" if fix.fits else "does not fit either"
        yield f"; with {fix.overrides} {size(fix.peak_bytes)} of tensors, which {verdict}"
