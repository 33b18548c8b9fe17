"""The checks of `limbeck check`, and the plan of memory, disk and time."""

from limbeck.checks.case import Case
from limbeck.checks.cluster import (
    COMPUTE_SHARE,
    LINK_SHARE,
    RESERVED_BYTES,
    cluster_findings,
    cluster_plan,
    fits,
    passes_of_a_rank,
)
from limbeck.checks.hardware import HARDWARE, Hardware, read_hardware
from limbeck.checks.number_format import IN_BFLOAT16, WORTH_IT, bfloat16_gain, number_format_notes
from limbeck.checks.plan import Cluster, Fix, Plan, make_plan, plan_findings
from limbeck.checks.proof import Finding, Proof
from limbeck.checks.prove import prove, prove_unlike
from limbeck.checks.text import Excerpt, quantized_reads_as_well, text_notes, trained_on

__all__ = [
    "COMPUTE_SHARE",
    "HARDWARE",
    "IN_BFLOAT16",
    "LINK_SHARE",
    "RESERVED_BYTES",
    "WORTH_IT",
    "Case",
    "Cluster",
    "Excerpt",
    "Finding",
    "Fix",
    "Hardware",
    "Plan",
    "Proof",
    "bfloat16_gain",
    "cluster_findings",
    "cluster_plan",
    "fits",
    "make_plan",
    "number_format_notes",
    "passes_of_a_rank",
    "plan_findings",
    "prove",
    "prove_unlike",
    "quantized_reads_as_well",
    "read_hardware",
    "text_notes",
    "trained_on",
]
