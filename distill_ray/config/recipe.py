"""The whole recipe, its cross-section rules, and reading it from TOML."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from distill_ray.config.cluster import ClusterSection
from distill_ray.config.cost import CostSection
from distill_ray.config.kinds import Placement, Section
from distill_ray.config.loss import LossSection
from distill_ray.config.sections import (
    AuditSection,
    CaptureSection,
    CorpusSection,
    EvaluateSection,
    ExportSection,
    StorageSection,
    TeacherSection,
)
from distill_ray.config.student import StudentSection, TrainSection
from distill_ray.errors import UserError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def iso_week(today: dt.date | None = None) -> str:
    """The default version: ISO year and week, `2026-W47`."""
    year, week, _ = (today or dt.datetime.now(dt.UTC).date()).isocalendar()
    return f"{year}-W{week:02d}"


class Recipe(Section):
    """One distillation run. `name` and `version` place its artefacts; the sections say what is computed."""

    name: Placement[str]
    """Artefact name: lower-case letters, digits, `.`, `_`, `-`; at most 63."""
    version: Placement[str] = Field(default_factory=iso_week)
    """Version of this run; the ISO week unless stated."""
    storage: StorageSection
    corpus: CorpusSection
    teacher: TeacherSection
    capture: CaptureSection = CaptureSection()
    audit: AuditSection = AuditSection()
    student: StudentSection
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()
    # Stated to be placement as a whole, so that no identity holds even its name.
    cost: Placement[CostSection] = CostSection()
    """Prices, for figures alone."""
    cluster: Placement[ClusterSection] = ClusterSection()
    """Where the run is placed."""

    @field_validator("name", "version")
    @classmethod
    def _safe(cls, value: str) -> str:
        if not _NAME.fullmatch(value.lower()):
            raise ValueError(f"{value!r} is not a safe path part; use letters, digits, '.', '_', '-' (at most 63)")
        return value

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for T in self.loss.temperatures:
            if T not in self.capture.temperatures:
                raise ValueError(
                    f"loss.temperature={T} was not captured (capture.temperatures="
                    f"{list(self.capture.temperatures)}); the tail mass at T cannot be known from the kept tokens: "
                    f"add {T} to capture.temperatures"
                )
        self._draws_serve_the_loss()
        if self.train.loss_spike and (self.loss.hard_label_points or self.loss.temperature_steps):
            raise ValueError(
                f"train.loss_spike={self.train.loss_spike} compares a step's loss with those of earlier steps, and "
                "loss.hard_label_points and loss.temperature_steps change what the loss is: a healthy step would be a "
                "spike; leave out one of them"
            )
        if self.train.loss_spike and self.loss.objective == "truncated":
            raise ValueError(
                f"train.loss_spike={self.train.loss_spike} is a multiple of the median loss, and loss.objective="
                '"truncated" falls below 0, where no multiple is a bound; leave out loss_spike, or use "bucket"'
            )
        generate = self.capture.generate
        if generate is not None and generate.max_tokens >= self.corpus.window_tokens:
            raise ValueError(
                f"capture.generate.max_tokens={generate.max_tokens} leaves no room for a prompt in "
                f"corpus.window_tokens={self.corpus.window_tokens}; lower max_tokens or raise window_tokens"
            )
        if self.audit.engine == "transformers" and self.teacher.quantization is not None:
            raise ValueError(
                f'audit.engine="transformers" cannot load teacher.quantization={self.teacher.quantization!r}, which is '
                'vLLM\'s; use audit.engine = "vllm"'
            )
        if self.train.pack_tokens < self.corpus.window_tokens:
            raise ValueError(
                f"train.pack_tokens={self.train.pack_tokens} is less than corpus.window_tokens="
                f"{self.corpus.window_tokens}: a full window would not fit one packed row; raise pack_tokens"
            )
        return self

    def _draws_serve_the_loss(self) -> None:
        loss, capture = self.loss, self.capture
        if not loss.needs_draws:
            return
        if not capture.draws or capture.draws_from != loss.draws_from:
            whole = {"all": "the teacher's whole distribution", "tail": f"outside its top {capture.top_k}"}
            raise ValueError(
                f'loss.objective="{loss.objective}" needs tokens drawn from {whole[str(loss.draws_from)]} in the '
                f"teacher's process, but capture.draws={capture.draws} and capture.draws_from="
                f'"{capture.draws_from}"; set capture.draws = {capture.draws or 50} and capture.draws_from = '
                f'"{loss.draws_from}", or use objective = "bucket"'
            )
        if loss.temperature != capture.draws_temperature:
            raise ValueError(
                f"loss.temperature={loss.temperature}, but tokens are drawn at capture.draws_temperature="
                f"{capture.draws_temperature}, and another temperature needs other draws; set both to one value"
            )

    @property
    def run_prefix(self) -> str:
        """Key of this run's folder under the storage root."""
        return f"runs/{self.name}/{self.version}"

    @property
    def model_prefix(self) -> str:
        """Key of the published model's folder under the storage root."""
        return f"models/{self.name}/{self.version}"


def _explain(error: ValidationError, origin: str) -> str:
    lines = [f"{origin}: {error.error_count()} problem(s) in the recipe"]
    for e in error.errors(include_url=False, include_context=False):
        where = ".".join(part for part in map(str, e["loc"]) if not part.startswith("[")) or "recipe"
        got = "" if e["type"] in ("missing", "extra_forbidden") or not e["loc"] else f" (got {e['input']!r})"
        message = {
            "extra_forbidden": "unknown key; remove it or correct its spelling",
            "missing": "required, but not stated",
            "model_type": "Input should be a table",
            "tuple_type": "Input should be a list",
        }.get(e["type"], e["msg"].removeprefix("Value error, "))
        lines.append(f"  {where}: {message}{got}")
    return "\n".join(lines)


def parse_recipe(
    data: dict[str, Any], origin: str = "recipe", *, root: str | None = None, version: str | None = None
) -> Recipe:
    """Validate a recipe given as nested dicts; `root` and `version` override the file's.

    Raises:
        UserError: every problem found, one line each.
    """
    data = dict(data)
    if root is not None:
        stated = data.get("storage", {})
        # Something else than a table is left for the validation to name.
        data["storage"] = {**stated, "root": root} if isinstance(stated, dict) else stated
    if version is not None:
        data["version"] = version
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, origin)) from None


def load_recipe(
    path: str | Path, *, root: str | None = None, version: str | None = None, changes: Sequence[str] = ()
) -> Recipe:
    """Read and validate a TOML recipe.

    Args:
        path: the recipe file.
        changes: what replaces its values, each `section.key=value` with the value as TOML has it; a bare word is text.
        root: replaces `storage.root` (a local folder or `s3://…`).
        version: replaces `version` (default: the ISO week of today, UTC).

    Raises:
        UserError: the file is missing, is not TOML, or breaks a rule; a change is not written so.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; shipped ones lie in jobs/recipes/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from None
    for change in changes:
        _apply(data, change)
    return parse_recipe(data, str(path), root=root, version=version)


def _apply(data: dict[str, Any], change: str) -> None:
    key, equals, text = (part.strip() for part in change.partition("="))
    *sections, last = key.split(".")
    if not (equals and text and last and all(sections)):
        raise UserError(f"--set {change!r}: write section.key=value, such as train.epochs=3")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {change!r}: {section} is a value of the recipe, not a section")
    try:
        (data[last],) = tomllib.loads(f"value = {text}").values()
    except ValueError:  # no TOML, or more than one value
        data[last] = text
