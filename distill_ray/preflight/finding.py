"""What `check` finds right; what is wrong is raised."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was checked and found right."""

    what: str
    fact: str
