"""The checks of `limbeck check`, and the plan of memory, disk and time."""

from limbeck.checks.case import Case
from limbeck.checks.plan import Plan, make_plan, plan_findings
from limbeck.checks.proof import Finding, Proof, Unproven
from limbeck.checks.prove import prove, prove_unlike
from limbeck.checks.text import Excerpt, text_notes, trained_on

__all__ = [
    "Case",
    "Excerpt",
    "Finding",
    "Plan",
    "Proof",
    "Unproven",
    "make_plan",
    "plan_findings",
    "prove",
    "prove_unlike",
    "text_notes",
    "trained_on",
]
