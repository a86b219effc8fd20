"""The traps of soft-target distillation as code: each plant must make its named test fail.

A plant replaces one exact piece of source text in a copy of the repository; the originals are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    trap: str
    """The trap, in the words of its list."""
    file: str
    old: str
    """Occurs exactly once in `file`."""
    new: str
    test: str
    """Pytest node that must fail."""


MUTANTS: tuple[Mutant, ...] = ()
