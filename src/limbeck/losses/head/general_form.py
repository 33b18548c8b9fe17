"""Any terms, any head, any form of teacher: gradients by autograd, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.distributions.base import TeacherDistribution
from limbeck.losses.head.blocks import BlockBody
from limbeck.losses.head.fused import chunks, weighted_sum
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.terms.base import LogitTerm, StudentView

GRAPH_COPIES = 16
"""Arrays of the size of one block of logits that the graph holds at once, about."""


class GeneralForm(BlockBody):
    """Any logit terms. The gradient overwrites the logits."""

    def __init__(
        self,
        terms: Sequence[LogitTerm],
        weights: Sequence[float],
        student: StudentView,
        distribution: TeacherDistribution | None,
        workspace: Workspace,
    ) -> None:
        """
        Args:
            distribution: The teacher's at the N tokens; without one, terms that read it are 0.
        """
        super().__init__(
            weights,
            student,
            distribution if any(term.needs.distribution for term in terms) else None,
            workspace,
            block_arrays=GRAPH_COPIES,
            chunk_arrays=GRAPH_COPIES,
        )
        self.terms, self.student = terms, student

    def __call__(
        self, products: Float[Tensor, "n V"], window: slice, wants_gradient: bool
    ) -> tuple[Float[Tensor, " terms"], Float[Tensor, "n V"]]:
        """Each term summed over the rows; the gradient of their weighted sum is in `products`."""
        chunk = self.teacher.at(window)
        sums = products.new_zeros(len(self.weights), dtype=self.exact)
        for few in chunks(len(products), self.block):
            place = slice(window.start + few.start, window.start + few.stop)
            teacher = None if chunk is None else chunk.rows(few)
            sums += self._rows(products[few], place, teacher, wants_gradient)
        return sums, products

    def _rows(
        self,
        logits: Float[Tensor, "n V"],
        place: slice,
        teacher: TeacherDistribution | None,
        wants_gradient: bool,
    ) -> Float[Tensor, " terms"]:
        """Each term summed over a few rows; overwrites logits with the gradient if wanted."""
        if not wants_gradient:
            return self._sums(logits, place, teacher)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            sums = self._sums(leaf, place, teacher)
            if not sums.requires_grad:
                logits.zero_()
                return sums
            (gradient,) = torch.autograd.grad(weighted_sum(sums, self.weights), leaf)
        logits.copy_(gradient)
        return sums.detach()

    def _sums(
        self, products: Float[Tensor, "n V"], place: slice, teacher: TeacherDistribution | None
    ) -> Float[Tensor, " terms"]:
        """Each term summed over a few rows."""
        transform, targets = self.student.head.transform, self.student.targets[place]
        logits = products if transform is None else transform(products)
        sums = [logits.new_zeros(0, dtype=self.exact)]
        for term, weight in zip(self.terms, self.weights, strict=True):
            if teacher is None and term.needs.distribution:
                sums.append(logits.new_zeros(1, dtype=self.exact))
                continue
            # A term of weight zero is only logged, so it needs no graph.
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                values = self.student.weigh(term(logits, targets, teacher), place)
                sums.append(values.sum().to(self.exact)[None])
        return torch.cat(sums)
