"""Every metric that a run emits, in one table, and the one way to emit them.

Emitted through Ray, each node's agent exports a gauge to Prometheus as `ray_<name>` and a counter as
`ray_<name>_total`. The agent forgets a gauge two report intervals (20 s) after it was last set, so that a run that
is over raises no alarm; it keeps a counter's last value. A counter first appears with its first increase: there is no
0 before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

LABELS = ("run", "version", "stage")
"""Labels of every metric: the recipe's name and version, and the stage of the command that emits it."""


@dataclass(frozen=True)
class Metric:
    """One metric that we declare."""

    name: str
    kind: Literal["gauge", "counter"]
    """A counter counts from 0 in every command; Prometheus sees a reset."""
    unit: str
    description: str

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


_DECLARED = (
    # Capture.
    Metric("distill_capture_units", "gauge", "units", "Corpus units of the run"),
    Metric("distill_capture_units_done", "gauge", "units", "Corpus units that are captured"),
    Metric("distill_capture_rows", "counter", "rows", "Target rows captured"),
    Metric("distill_capture_rows_per_second", "gauge", "rows/s", "Target rows a second of all teachers together"),
    Metric("distill_capture_documents", "counter", "documents", "Documents captured; windows of one count once a unit"),
    Metric(
        "distill_capture_dead_letters", "counter", "documents", "Documents and sequences that could not be captured"
    ),
    Metric("distill_teacher_actors", "gauge", "actors", "Teachers alive, those that still load among them"),
    Metric("distill_teacher_start_seconds", "counter", "s", "Teachers: staging and loading weights"),
    Metric("distill_teacher_busy_seconds", "counter", "s", "Teachers: the engine had a unit"),
    Metric("distill_teacher_idle_seconds", "counter", "s", "Teachers: the open engine had none"),
    # Money by the recipe's prices; only where it states them.
    Metric(
        "distill_cost_dollars",
        "gauge",
        "$",
        "Cost of training's steps; of capture, with a budget that of all commands",
    ),
    Metric("distill_budget_dollars", "gauge", "$", "Most that the stage may cost in all commands"),
    # Training. Means over the supervised tokens of the newest step.
    Metric("distill_train_steps", "gauge", "steps", "Optimizer steps of the run"),
    Metric("distill_train_steps_done", "gauge", "steps", "Optimizer steps done; goes back where a group is restarted"),
    Metric("distill_train_loss", "gauge", "nats", "The objective"),
    Metric("distill_train_ce", "gauge", "nats", "Cross-entropy to the actual next token"),
    Metric("distill_train_kl_t", "gauge", "nats", "KL to the teacher at the loss's temperature"),
    Metric("distill_train_kl_t1", "gauge", "nats", "KL to the teacher at temperature 1"),
    Metric("distill_train_kept_mass", "gauge", "share", "Teacher's probability of its kept tokens"),
    Metric("distill_train_top1_agreement", "gauge", "share", "Rows whose most likely token is the teacher's"),
    Metric("distill_train_grad_norm", "gauge", "1", "Gradient norm before clipping"),
    Metric("distill_train_learning_rate", "gauge", "1", "Learning rate"),
    Metric("distill_train_tokens", "counter", "tokens", "Tokens trained on, supervised or not; no padding"),
    Metric("distill_train_tokens_per_second", "gauge", "tokens/s", "Tokens of the newest step over its seconds"),
    Metric("distill_train_mfu", "gauge", "share", "Model FLOP/s over the devices' peak; only where that is known"),
    Metric("distill_train_data_wait_seconds", "counter", "s", "Rank 0 waited for batches"),
    Metric(
        "distill_train_bad_steps", "counter", "steps", "Steps with a bad loss or gradient: skipped, or the last one"
    ),
    Metric("distill_train_workers", "gauge", "workers", "Workers of the group"),
    Metric("distill_train_host_peak_bytes", "gauge", "bytes", "Most host memory that rank 0's process ever had (RSS)"),
    Metric("distill_train_cuda_peak_bytes", "gauge", "bytes", "Most memory that rank 0 ever allocated on its GPU"),
    # Checkpoints.
    Metric("distill_checkpoint_step", "gauge", "steps", "Step of this command's newest published checkpoint"),
    Metric("distill_checkpoint_age_seconds", "gauge", "s", "Since it was published, before the first since the start"),
    Metric("distill_checkpoint_interval_seconds", "gauge", "s", "Between two checkpoints at the newest steps' pace"),
    Metric("distill_checkpoint_blocked_seconds", "counter", "s", "Rank 0's training thread spent on checkpoints"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _DECLARED}

Record = Callable[[float, dict[str, str]], None]
"""Takes a gauge's value, or a counter's increase, and the labels."""
Instrument = Callable[[Metric], Record]
"""Makes what records a metric."""


def ray_instrument(metric: Metric) -> Record:
    """Exported by the agent of the node that this process is on. Ray is connected."""
    from ray.util.metrics import Counter, Gauge

    text = f"{metric.description} ({metric.unit})"
    if metric.kind == "gauge":
        return Gauge(metric.name, text, LABELS).set
    return Counter(metric.name, text, LABELS).inc


class Meters:
    """Emits the declared metrics of one stage of one command. Names are given without their prefix `distill_`.

    Args:
        run: the recipe's name.
        version: of the run.
        stage: as in `schema.ARTEFACT_OF`.
        instrument: where metrics go.
    """

    def __init__(self, run: str, version: str, stage: str, instrument: Instrument = ray_instrument) -> None:
        self._labels = {"run": run, "version": version, "stage": stage}
        self._instrument = instrument
        self._records: dict[str, Record] = {}
        self._reached: dict[str, float] = {}
        self._gauges: dict[str, float] = {}

    def set(self, name: str, value: float) -> None:
        """A gauge's value.

        Raises:
            KeyError: no such gauge is declared.
        """
        self._record(name, "gauge")(value, self._labels)
        self._gauges[name] = value

    def refresh(self) -> None:
        """Set every gauge again. An agent forgets one that it was not told of for 20 s, whoever lives."""
        for name, value in self._gauges.items():
            self._record(name, "gauge")(value, self._labels)

    def add(self, name: str, increase: float) -> None:
        """What a counter has grown by; 0 is nothing.

        Raises:
            KeyError: no such counter is declared.
        """
        record = self._record(name, "counter")
        if increase:
            record(increase, self._labels)

    def reach(self, name: str, total: float) -> None:
        """What a counter has come to since the command began; less than before is nothing.

        Raises:
            KeyError: no such counter is declared.
        """
        before = self._reached.get(name, 0.0)
        self.add(name, max(0.0, total - before))
        self._reached[name] = max(before, total)

    def _record(self, name: str, kind: str) -> Record:
        full = f"distill_{name}"
        metric = METRICS.get(full)
        if metric is None or metric.kind != kind:
            raise KeyError(f"no {kind} {full} is declared in distill_ray/metrics.py; declare it, or correct the name")
        if full not in self._records:
            self._records[full] = self._instrument(metric)
        return self._records[full]
