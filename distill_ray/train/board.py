"""What driver and workers tell each other during training: a small actor beside the driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill_ray.session import on_this_node

GO, STOP, LEAVE = 0, 1, 2


@dataclass
class News:
    """What happened since the driver last asked."""

    steps: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    """Steps whose checkpoints count from now on."""


class Board:
    """Rank 0 posts steps and learns of a stop; any rank posts the error that ends the run."""

    def __init__(self) -> None:
        self._news = News()
        self._stop = False
        self._leave = False
        self._error: Exception | None = None
        self._final = False
        self._placed = False
        self._sized = False
        self._groups = 0
        self._out_of_memory: dict[int, int] = {}

    def size(self) -> None:
        """An elastic group's number of workers has been chosen, so Ray Train now asks for their places."""
        self._sized = True

    def sized(self) -> bool:
        """Whether that has happened."""
        return self._sized

    def enter(self) -> None:
        """A worker has been placed on the cluster and runs."""
        self._placed = True

    def placed(self) -> bool:
        """Whether any worker of any group has run yet."""
        return self._placed

    def start(self, step: int) -> None:
        """The workers are ready and go on from `step`: what a group before them failed with is mended."""
        self._leave = False
        self._groups += 1
        if not self._final:
            self._error = None
        self._news.steps.append({"start": step})

    def post(self, line: dict[str, float]) -> int:
        """One finished step; answers GO, STOP or LEAVE."""
        self._news.steps.append(line)
        return STOP if self._stop else LEAVE if self._leave else GO

    def note(self, text: str) -> None:
        """A sentence for the user."""
        self._news.notes.append(text)

    def saved(self, step: int) -> None:
        """The checkpoint of `step` counts."""
        self._news.saved.append(step)

    def fail(self, error: Exception, final: bool) -> None:
        """A worker's error; a `final` one must not be tried again."""
        if not self._final:
            self._error, self._final = error, final

    def out_of_memory(self, step: int) -> bool:
        """A worker ran out of memory at `step`; whether a group before its own did there, too."""
        return self._out_of_memory.setdefault(step, self._groups) != self._groups

    def final_error(self) -> bool:
        """Whether a restarted worker group must give up at once."""
        return self._final

    def ask_stop(self) -> None:
        """The driver wants the workers to save and return."""
        self._stop = True

    def ask_leave(self) -> None:
        """The group is to save and be started again at another size."""
        self._leave = True

    def stopping(self) -> bool:
        """Whether the driver wants them to."""
        return self._stop

    def drain(self) -> News:
        """News since the last call."""
        news, self._news = self._news, News()
        return news

    def error(self) -> tuple[Exception | None, bool]:
        """The last error posted and whether it is final."""
        return self._error, self._final


def start_board(kind: type[Board] = Board) -> Any:
    """The actor, on the driver's own node: it lives as long as the driver does."""
    import ray

    return ray.remote(kind).options(**on_this_node()).remote()
