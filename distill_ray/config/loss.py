"""The `[loss]` section: objective, temperature and mix, each constant or scheduled over the run."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill_ray.config.kinds import Identity, Listed, Section

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]


class LossSection(Section):
    objective: Identity[
        Literal["bucket", "truncated", "renormalised", "sampled", "head_tail", "reverse_kl", "jsd", "skewed_kl"]
    ] = "bucket"
    """`bucket`: KL over the kept tokens plus one bucket for the tail, and `reverse_kl`, `jsd`, `skewed_kl` on the same
    partition; `truncated`, `renormalised`: kept tokens alone; `sampled`, `head_tail`: unbiased, on drawn tokens."""
    temperature: Identity[Temperature] = 1.0
    """Distillation temperature; must be one of capture.temperatures."""
    temperature_steps: Identity[Listed[tuple[Listed[tuple[Share, Temperature]], ...]]] = ()
    """`[[0.5, 1.0], …]`: from that share of the training steps on, that captured temperature; ascending."""
    hard_label_weight: Identity[Share] = 0.1
    """α of (1 − α)·T²·KL + α·CE; 0 to 1."""
    hard_label_points: Identity[Listed[tuple[Listed[tuple[Share, Share]], ...]]] = ()
    """`[[1.0, 0.5], …]`: at that share of the training steps, that α, linear between; from hard_label_weight at 0."""
    jsd_beta: Identity[float] = Field(default=0.5, gt=0, lt=1)
    """β of `jsd`: the teacher's share of the mixture; towards 0 the forward KL, towards 1 the reverse."""
    skew: Identity[float] = Field(default=0.1, gt=0, lt=1)
    """s of `skewed_kl`: the teacher's share of the mixture; towards 0 the forward KL."""

    @model_validator(mode="after")
    def _parameters_are_used(self) -> Self:
        for name, objective in (("jsd_beta", "jsd"), ("skew", "skewed_kl")):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and self.objective != objective:
                raise ValueError(
                    f'{name}={value} has no effect on objective = "{self.objective}"; remove it or use "{objective}"'
                )
        return self

    @model_validator(mode="after")
    def _schedules_ascend(self) -> Self:
        for name in ("temperature_steps", "hard_label_points"):
            at = [share for share, _ in getattr(self, name)]
            if any(a >= b for a, b in pairwise([0.0, *at])):
                raise ValueError(f"{name} stands at shares {at} of the run; they must ascend and be greater than 0")
        if self.needs_draws and self.temperature_steps:
            raise ValueError(
                f'objective = "{self.objective}" draws tokens at one temperature, at capture: temperature_steps='
                f"{[list(x) for x in self.temperature_steps]} would need other draws; remove it"
            )
        return self

    @property
    def needs_draws(self) -> bool:
        """Whether the objective takes tokens drawn from the teacher instead of its top k."""
        return self.draws_from is not None

    @property
    def draws_from(self) -> str | None:
        """What the objective's draws are made from, as `capture.draws_from` names it; None where it needs none."""
        return {"sampled": "all", "head_tail": "tail"}.get(self.objective)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Every temperature of the run, ascending."""
        return tuple(sorted({self.temperature, *(t for _, t in self.temperature_steps)}))

    def temperature_at(self, step: int, steps: int) -> float:
        """T of global batch `step` of `steps`: that of the last entry whose share of the run is reached."""
        return next((t for share, t in reversed(self.temperature_steps) if step >= share * steps), self.temperature)

    def hard_label_weight_at(self, step: int, steps: int) -> float:
        """α of global batch `step` of `steps`, linear between the points and constant after the last."""
        points = ((0.0, self.hard_label_weight), *self.hard_label_points)
        share = step / steps
        for (a, low), (b, high) in pairwise(points):
            if share < b:
                return low + (high - low) * (share - a) / (b - a)
        return points[-1][1]
