"""Progress that a person reads on a terminal and a machine reads elsewhere."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Value = float | int | str | None


class Progress:
    """One stage's progress: a bar on a terminal, one JSON line per interval elsewhere, both on standard error.

    Args:
        stage: name shown, e.g. "capture".
        total: units of work, or None if unknown.
        unit: what is counted, e.g. "units" or "steps".
        interval_s: least seconds between two JSON lines.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str,
        *,
        interval_s: float = 5.0,
        stream: IO[str] | None = None,
    ) -> None:
        self._stage, self._total, self._unit, self._interval = stage, total, unit, interval_s
        self._stream = stream or sys.stderr
        self._done, self._fields = 0, dict[str, Value]()
        self._started = self._last = time.monotonic()
        self._bar: RichProgress | None = None
        if self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("[bold]{task.description:<9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(stage, total=total, detail="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        else:
            self._line("start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        else:
            self._line("end" if kind is None else "stopped")

    def advance(self, count: int = 1, **fields: Value) -> None:
        """Count `count` more units of work; `fields` are the latest figures to show beside them."""
        self._done += count
        self._fields.update(fields)
        if self._bar:
            detail = "  ".join(f"{k} {_short(v)}" for k, v in self._fields.items())
            self._bar.update(self._task, advance=count, detail=detail)
        elif time.monotonic() - self._last >= self._interval:
            self._line("progress")

    def note(self, text: str) -> None:
        """Say one sentence, once."""
        if self._bar:
            self._bar.console.print(f"{self._stage}: {text}", highlight=False, markup=False)
        else:
            self._line("note", note=text)

    def _line(self, event: str, **extra: Value) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._started
        eta = elapsed / self._done * (self._total - self._done) if self._done and self._total else None
        record = {
            "time": round(time.time(), 3),
            "stage": self._stage,
            "event": event,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "elapsed_s": round(elapsed, 3),
            "eta_s": None if eta is None else round(eta, 1),
            **self._fields,
            **extra,
        }
        print(json.dumps(record), file=self._stream, flush=True)


def say(stage: str, text: str) -> None:
    """One sentence on standard error: as it is on a terminal, as a JSON line elsewhere."""
    if sys.stderr.isatty():
        print(f"{stage}: {text}", file=sys.stderr, flush=True)
    else:
        record = {"time": round(time.time(), 3), "stage": stage, "event": "note", "note": text}
        print(json.dumps(record), file=sys.stderr, flush=True)


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
