"""What is wrong with one document, and stays with it."""

from __future__ import annotations


class RefusedDocument(ValueError):
    """A document that fails for its own reasons; becomes a dead letter and never leaves this package."""
