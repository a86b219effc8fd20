"""`[cost]`: prices and rates, for figures alone.

There are no defaults: what has no price stated gets no dollars, and what has no rate stated or measured no hours.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from distill_ray.config.kinds import Placement, Section

Dollars = Annotated[float, Field(ge=0)]


class ServingSection(Section):
    """What serving would cost, for the break-even of the student against its teacher."""

    tokens_per_request: Placement[float | None] = Field(default=None, gt=0)
    """Tokens of a request and its answer together, on average."""
    teacher_million_tokens: Placement[Dollars | None] = None
    """Dollars of a million tokens served by the teacher, as tokens_per_request counts them."""
    student_million_tokens: Placement[Dollars | None] = None
    """Dollars of a million tokens served by the student."""
    teacher_gpu_hours: Placement[Dollars | None] = None
    """Instead of dollars: GPU-hours of a million tokens served by the teacher, at `cost.teacher_gpu_hour`."""
    student_gpu_hours: Placement[Dollars | None] = None
    """Instead of dollars: GPU-hours of a million tokens served by the student, at `cost.student_gpu_hour`."""
    horizon_days: Placement[float | None] = Field(default=None, gt=0)
    """Days for which this student serves, 7 where there is a new one each week."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        for who in ("teacher", "student"):
            if None not in (getattr(self, f"{who}_million_tokens"), getattr(self, f"{who}_gpu_hours")):
                raise ValueError(
                    f"{who}_million_tokens and {who}_gpu_hours both say what a million tokens of the {who} cost; "
                    "remove one"
                )
        return self


class RatesSection(Section):
    """How fast processes work, for the forecast; what is not stated is taken from the newest version that measured."""

    teacher_tokens_s: Placement[float | None] = Field(default=None, gt=0)
    """Tokens a second of one teacher replica, all its devices together, prompts and completions alike, over the time in
    which it is ready, its waits for work included."""
    teacher_start_s: Placement[float | None] = Field(default=None, ge=0)
    """Seconds until a replica is ready."""
    student_tokens_s: Placement[float | None] = Field(default=None, gt=0)
    """Tokens a second of one training worker, supervised or not, over the time in which it is ready, its waits for data
    and its checkpoints included."""
    student_start_s: Placement[float | None] = Field(default=None, ge=0)
    """Seconds until a training worker is ready."""

    @model_validator(mode="after")
    def _starts_belong_to_rates(self) -> Self:
        for who in ("teacher", "student"):
            if getattr(self, f"{who}_start_s") is not None and getattr(self, f"{who}_tokens_s") is None:
                raise ValueError(f"{who}_start_s has no effect without {who}_tokens_s; state both or remove it")
        return self


class CostSection(Section):
    teacher_gpu_hour: Placement[Dollars | None] = None
    """Dollars of one GPU of a teacher for an hour; with it, progress and report show what teachers cost."""
    student_gpu_hour: Placement[Dollars | None] = None
    """Dollars of one GPU of a training worker, or of evaluation, for an hour; with it, the report shows what those
    cost."""
    device_hour: Placement[dict[str, Dollars]] = Field(default_factory=dict)
    """Node type → dollars of one of its devices for an hour, before the two above. A device is a GPU, or one process
    where the recipe uses none. The node type is Ray's node label `ray.io/node-group`, with `/spot` after it where
    `ray.io/market-type` says so, and `local` on a node without that label."""
    storage_gb_month: Placement[Dollars | None] = None
    """Dollars of 10⁹ bytes stored for a month."""
    serving: Placement[ServingSection] = ServingSection()
    """What serving teacher and student costs."""
    rates: Placement[RatesSection] = RatesSection()
    """What the forecast reckons with, before anything runs."""

    def prices(self) -> dict[str, Any]:
        """What a report is priced by, as plain JSON values; rates change no report."""
        return self.model_dump(mode="json", exclude={"rates"})
