"""The forms a store keeps distributions in, one per file."""

from limbeck.store.forms.base import Form, forms, written_out

__all__ = ["Form", "forms", "written_out"]
