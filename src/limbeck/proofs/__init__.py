"""What `limbeck check` proves on the user's own pair, and the plan of memory, disk and time."""

from limbeck.proofs.case import Case, Rows
from limbeck.proofs.plan import Disk, Measured, Plan, make_plan, plan_findings
from limbeck.proofs.proof import Finding, Proof, Unproven
from limbeck.proofs.prove import prove
from limbeck.proofs.text import Segment, text_notes, trained_on

__all__ = [
    "Case",
    "Disk",
    "Finding",
    "Measured",
    "Plan",
    "Proof",
    "Rows",
    "Segment",
    "Unproven",
    "make_plan",
    "plan_findings",
    "prove",
    "text_notes",
    "trained_on",
]
