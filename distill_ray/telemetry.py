"""Progress that a person reads on a terminal and a machine reads elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

Value = float | int | str | None


class Pace:
    """How fast work of some weight is done, and when all of it will be.

    The time before the first piece came counts only until there is a second one: a start says nothing of speed.

    Args:
        left: weight of what is to be done; None if unknown.
        now: seconds, as in the other calls.
    """

    def __init__(self, left: float | None, now: float) -> None:
        self.left = left
        self._started = self._first = self._last = now
        self._done = self._since_first = 0.0

    def add(self, weight: float, now: float) -> None:
        """A piece is done."""
        if self._done:
            self._since_first += weight
        else:
            self._first = now
        self._done += weight
        self._last = now
        if self.left is not None:
            self.left = max(0.0, self.left - weight)

    @property
    def rate(self) -> float | None:
        """Weight a second; None as long as it cannot be told."""
        if self._last > self._first:
            return self._since_first / (self._last - self._first) or None
        return self._done / (self._last - self._started) if self._done and self._last > self._started else None

    def eta_s(self, now: float) -> float | None:
        """Seconds from now to the end; None as long as they cannot be told."""
        rate = self.rate
        return None if rate is None or self.left is None else max(0.0, self.left / rate - (now - self._last))


class _RemainingColumn(ProgressColumn):
    def __init__(self, eta_s: Callable[[], float | None]) -> None:
        super().__init__(Column(no_wrap=True))
        self._eta_s = eta_s

    def render(self, task: Task) -> Text:
        eta_s = self._eta_s()
        if eta_s is None:
            return Text("-:--:--", style="progress.remaining")
        minutes, seconds = divmod(int(eta_s), 60)
        return Text(f"{minutes // 60:d}:{minutes % 60:02d}:{seconds:02d}", style="progress.remaining")


class Progress:
    """One stage's progress: a bar on a terminal, one JSON line per interval elsewhere, both on standard error.

    Args:
        stage: name shown, e.g. "capture".
        total: units of work, or None if unknown.
        unit: what is counted, e.g. "units" or "steps".
        interval_s: least seconds between two JSON lines.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str,
        *,
        interval_s: float = 5.0,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._total, self._unit, self._interval = stage, total, unit, interval_s
        self._stream = stream or sys.stderr
        self._done, self._fields = 0, dict[str, Value]()
        self._clock = clock
        self._started = self._last = clock()
        self._pace, self._weighed = Pace(total, self._started), False
        self._bar: RichProgress | None = None
        if self._stream.isatty():
            self._bar = RichProgress(
                # Figures alone may wrap: on a narrow terminal the times would else be cut short.
                TextColumn("[bold]{task.description:<9}"),
                BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn(unit),
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                _RemainingColumn(self._eta_s),
                TextColumn("{task.fields[detail]}", table_column=Column()),
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

    def weigh(self, left: float) -> None:
        """Let the time that is left follow from weights, bytes say, and not from counts.

        Args:
            left: weight of all that is not done yet; each `advance` then states its own.
        """
        self._pace, self._weighed = Pace(left, self._clock()), True

    def skip(self, count: int, **fields: Value) -> None:
        """Count units that took this command no time, such as those done before; a negative count takes some back."""
        if not self._weighed and self._pace.left is not None:
            self._pace.left -= count
        self._show(count, fields)

    def advance(self, count: int = 1, weight: float | None = None, **fields: Value) -> None:
        """Count `count` more units of work; `fields` are the latest figures to show beside them."""
        self._pace.add(count if weight is None else weight, self._clock())
        self._show(count, fields)

    def _show(self, count: int, fields: dict[str, Value]) -> None:
        self._done += count
        self._fields.update(fields)
        if self._bar:
            detail = "  ".join(f"{k} {_short(v)}" for k, v in self._fields.items())
            self._bar.update(self._task, advance=count, detail=detail)
        elif self._clock() - self._last >= self._interval:
            self._line("progress")

    def _eta_s(self) -> float | None:
        return self._pace.eta_s(self._clock())

    def note(self, text: str) -> None:
        """Say one sentence, once."""
        if self._bar:
            self._bar.console.print(f"{self._stage}: {text}", highlight=False, markup=False)
        else:
            self._line("note", note=text)

    def _line(self, event: str, **extra: Value) -> None:
        self._last = self._clock()
        eta_s = self._eta_s()
        record = {
            "time": round(time.time(), 3),
            "stage": self._stage,
            "event": event,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "elapsed_s": round(self._last - self._started, 3),
            "eta_s": None if eta_s is None else round(eta_s, 1),
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
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
