"""`[capture.generate]`: how the teacher answers prompts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from distill_ray.config.kinds import Identity, Listed, Section

_LEAST_TEMPERATURE = 0.01


class GenerateSection(Section):
    samples: Identity[int] = Field(default=1, ge=1, le=1024)
    """Completions of each prompt; 1 to 1,024. All of a prompt's are trained on, or all held out."""
    temperature: Identity[float] = Field(default=1.0, ge=0, le=20)
    """What completions are drawn at; 0: the likeliest token each time. Targets are at T = 1 whatever it is."""
    top_p: Identity[float] = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that hold this mass together."""
    max_tokens: Identity[int] = Field(default=1024, ge=1)
    """Most tokens of a completion; a prompt must leave room for them in corpus.window_tokens."""
    stop: Identity[Listed[tuple[str, ...]]] = ()
    """Texts after which a completion ends, beside the model's own end tokens; they stay in it."""
    seed: Identity[int] = Field(default=0, ge=0)
    """Another one gives other completions. Each is drawn by a number made of it, of its prompt and of its place."""
    unfinished: Identity[Literal["keep", "drop"]] = "keep"
    """What becomes of completions that max_tokens cut; dropped ones become dead letters."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty stop text would end every completion at once; remove it")
        return value

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float) -> float:
        if 0 < value < _LEAST_TEMPERATURE:
            raise ValueError(f"temperature {value} is below {_LEAST_TEMPERATURE}, which vLLM would use instead; use 0")
        return value

    @model_validator(mode="after")
    def _greedy_once(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples={self.samples} at temperature=0 would be as many copies of one completion; use samples = 1 "
                "or a temperature"
            )
        return self
