"""Rows that wait in a worker until the front end fetches them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from distill_ray.teacher.spans import Span


@dataclass
class _Waiting:
    total: int
    pieces: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    """(first position, [count, W] words in host memory)."""
    copied: torch.cuda.Event | None = None
    """Set once the last of them has arrived there."""


class RowStore:
    """Words of prompt rows by request, placed by position: rows computed twice replace themselves."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self.recomputed = 0
        """Rows that came more than once: what preemption wasted."""
        self._failure = ""

    def fail(self, failure: str) -> None:
        """A step's rows could not be taken: whatever is fetched from now on is refused for that."""
        self._failure = self._failure or failure

    def add(self, spans: list[Span], words_RW: torch.Tensor) -> None:
        """Keep one step's rows, given in the spans' order. The copy to the host does not wait for the device."""
        host_RW, copied = words_RW, None
        if words_RW.is_cuda:
            host_RW = torch.empty(words_RW.shape, dtype=words_RW.dtype, pin_memory=True)
            host_RW.copy_(words_RW, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        at = 0
        for span in spans:
            waiting = self._waiting.setdefault(span.request, _Waiting(span.total))
            waiting.pieces.append((span.start, host_RW[at : at + span.count]))
            waiting.copied = copied
            at += span.count

    def pop(self, requests: list[str]) -> bytes:
        """The words of finished requests, one after the other; they are forgotten here.

        Raises:
            KeyError: a row of them was never computed.
            RuntimeError: rows of a step could not be taken.
        """
        if self._failure:
            raise RuntimeError(self._failure)
        taken = [(name, self._waiting.pop(name)) for name in requests]
        self.recomputed += sum(len(piece) for _, w in taken for _, piece in w.pieces) - sum(w.total for _, w in taken)
        return b"".join(piece.data for name, waiting in taken for piece in _in_order(name, waiting))

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)


def _in_order(name: str, waiting: _Waiting) -> list[np.ndarray]:
    """The rows as arrays that lie one after the other; copied only where they came out of order or twice."""
    if waiting.copied is not None:
        waiting.copied.synchronize()
    stops = [start + len(piece) for start, piece in waiting.pieces]
    if [start for start, _ in waiting.pieces] == [0, *stops[:-1]] and stops[-1] == waiting.total:
        return [piece.numpy() for _, piece in waiting.pieces]
    words = np.empty((waiting.total, waiting.pieces[0][1].shape[1]), np.int32)
    seen = np.zeros(waiting.total, bool)
    for start, piece in waiting.pieces:
        words[start : start + len(piece)] = piece.numpy()
        seen[start : start + len(piece)] = True
    if not seen.all():
        raise KeyError(f"{name}: {int((~seen).sum())} of {waiting.total} rows were never computed")
    return [words]
