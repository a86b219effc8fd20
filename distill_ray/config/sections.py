"""The sections of a recipe. Defaults live here; a recipe states only its choices."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from distill_ray.config.bounds import RELATIVE, Bound, Required, flattened, problems_of
from distill_ray.config.generate import GenerateSection
from distill_ray.config.kinds import AddedIdentity, Identity, Listed, Placement, Section
from distill_ray.config.values import Range, Uri

_COLUMNS: dict[str, set[str]] = {
    "messages": {"messages", "tools", "documents", "system"},
    "prompt_completion": {"prompt", "completion"},
}
_TEMPLATE_INPUTS = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "strftime_now"}


class StorageSection(Section):
    root: Placement[Uri]
    """Local folder or `s3://bucket/prefix` under which every artefact lies."""


class CorpusSection(Section):
    sources: Placement[Listed[tuple[Uri, ...]]] = Field(min_length=1)
    """Files or globs, local or `s3://`. What they hold, not where they lie, is the identity (through unit hashes)."""
    format: Identity[Literal["text", "prompt_completion", "messages"]] = "text"
    """`text`: one a record; `prompt_completion`: supervised on the completion; `messages`: on assistant turns."""
    text_column: Identity[str] = "text"
    """Column or key that holds the document; `format = "text"` only."""
    columns: AddedIdentity[dict[str, str]] = Field(default={})
    """Where sources name their columns or keys otherwise: `{ prompt = "question", completion = "answer" }`; of chats
    `messages`, `tools`, `documents`, `system`."""
    chat_template_kwargs: AddedIdentity[dict[str, bool | int | float | str]] = Field(default={})
    """The chat template's own switches, such as `{ enable_thinking = false }`, as a server would set them."""
    text_eos: AddedIdentity[bool] = True
    """End each document with the tokenizer's eos, supervised, so that the student learns to stop; `format = "text"`
    only."""
    holdout: Identity[float] = Field(default=0.01, ge=0, le=0.5)
    """Share of source documents kept out of training, chosen by document hash; 0 to 0.5."""
    window_tokens: Identity[int] = Field(default=4096, ge=2, le=1_048_576)
    """Most tokens in one sequence; longer documents become several windows."""
    window_overlap: Identity[int] = Field(default=1, ge=1)
    """Tokens a later window repeats from the one before as context; every token is supervised once. 1 or more."""
    unit_bytes: Identity[int] = Field(default=4 * 2**20, ge=1024)
    """Source bytes (before compression) of one unit of work; about 1 M tokens at the default 4 MiB."""

    @model_validator(mode="after")
    def _chat_options_agree(self) -> Self:
        if stray := sorted(self.columns.keys() - _COLUMNS.get(self.format, set())):
            raise ValueError(f'columns = {stray} have no effect with format="{self.format}"; remove them')
        if self.chat_template_kwargs and self.format != "messages":
            raise ValueError(f'chat_template_kwargs have no effect with format="{self.format}"; remove them')
        if taken := sorted(self.chat_template_kwargs.keys() & _TEMPLATE_INPUTS):
            raise ValueError(f"chat_template_kwargs: {taken} are given by each chat; remove them")
        return self

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.window_overlap >= self.window_tokens:
            raise ValueError(
                f"window_overlap={self.window_overlap} must be less than window_tokens={self.window_tokens}; "
                "lower the overlap"
            )
        return self


class TeacherSection(Section):
    model: Placement[Uri]
    """Hugging Face folder, local or `s3://`."""
    revision: Identity[str | None] = None
    """Name of the weights' revision: with one, weight files are sampled for the identity instead of hashed whole."""
    engine: Identity[Literal["vllm", "transformers"]] = "vllm"
    """`transformers` is the exact reference: slow, but also gives dense log-probabilities."""
    dtype: Identity[Literal["auto", "float32", "bfloat16", "float16"]] = "auto"
    """Arithmetic of the teacher; `auto` is what the model's config.json states, on every machine."""
    quantization: Identity[str | None] = None
    """vLLM quantisation name (`fp8`, …) where the checkpoint does not state it."""
    trust_remote_code: Identity[bool] = False
    """Run Python code that comes with the model folder."""
    tensor_parallel: Placement[int] = Field(default=1, ge=1, le=64)
    """GPUs (on a CPU: processes) one replica's layers are split over."""
    pipeline_parallel: Placement[int] = Field(default=1, ge=1, le=64)
    """Stages one replica's layers are split into."""
    replicas: Placement[Range] = Range(min=1, max=1)
    """Teacher actors, scaled by Ray Data between min and max."""
    batch_tokens: Placement[int] = Field(default=8192, ge=64)
    """Tokens vLLM schedules in one step."""
    gpu_memory_share: Placement[float] = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""
    cpu_cache_gib: Placement[int] = Field(default=1, ge=1)
    """KV cache of vLLM's CPU build, GiB."""
    use_gpu: Placement[bool] = True
    """False: the CPU build of vLLM, or transformers on the CPU."""
    public_path: Placement[bool] = False
    """Where rows cannot be captured inside vLLM's workers (another version of vLLM): take them from its public path,
    several times slower and without entropy, on GPUs too. On CPUs that is done, and said, without being asked for."""

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tensor_parallel * self.pipeline_parallel if self.use_gpu else 0


class CaptureSection(Section):
    top_k: Identity[int] = Field(default=64, ge=1, le=512)
    """Teacher tokens kept per position."""
    temperatures: Identity[Listed[tuple[float, ...]]] = (1.0,)
    """Temperatures at which the tail mass is stored exactly; 1.0 always is. Each 0.05 to 20."""
    draws: AddedIdentity[int] = Field(default=0, ge=0, le=4095)
    """Tokens drawn from the teacher per position, with replacement, beside the kept ones; 0 to 4,095. About 50 serve
    the `sampled` objective, fewer `head_tail`."""
    draws_from: AddedIdentity[Literal["all", "tail"]] = "all"
    """`all`: the whole distribution (objective `sampled`); `tail`: everything outside the kept tokens (`head_tail`)."""
    draws_temperature: AddedIdentity[float] = 1.0
    """Temperature that is drawn at; one of `temperatures`, and that of the loss."""
    mode: AddedIdentity[Literal["score", "generate"]] = "score"
    """`score`: the teacher reads the corpus; `generate`: the corpus holds prompts, which the teacher answers."""
    generate: AddedIdentity[GenerateSection | None] = None
    """How it answers; stated or at its defaults exactly where mode = "generate"."""
    max_refused: Placement[float] = Field(default=0.01, ge=0, le=1)
    """Share of the documents that may be refused; beyond it the run stops before it trains. 0 to 1."""
    max_gpu_hours: Placement[float | None] = Field(default=None, gt=0)
    """Hours, times GPUs, that teachers of this run may hold, their starts included and over all commands; then capture
    stops, and goes on when more is given. Of teachers without a GPU the processes' hours count. None: no limit."""

    @model_validator(mode="before")
    @classmethod
    def _generates_by_default(cls, data: Any) -> Any:
        # Left out or stated at its defaults, it must be the same capture.
        if isinstance(data, dict) and data.get("mode") == "generate" and data.get("generate") is None:
            return {**data, "generate": {}}
        return data

    @model_validator(mode="after")
    def _generate_agrees(self) -> Self:
        if self.generate is not None and self.mode != "generate":
            raise ValueError('[capture.generate] has no effect with mode="score"; set mode = "generate" or remove it')
        return self

    @field_validator("temperatures")
    @classmethod
    def _canonical(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for t in value:
            if not 0.05 <= t <= 20:
                raise ValueError(f"temperature {t} is outside 0.05 … 20")
        return tuple(sorted({1.0, *map(float, value)}))

    @model_validator(mode="after")
    def _draws_agree(self) -> Self:
        if not self.draws and (self.draws_from, self.draws_temperature) != ("all", 1.0):
            raise ValueError(
                f'draws_from="{self.draws_from}" and draws_temperature={self.draws_temperature} have no effect with '
                "draws=0; remove them or set draws, say draws = 50"
            )
        if self.draws_temperature not in self.temperatures:
            raise ValueError(
                f"draws_temperature={self.draws_temperature} is not one of temperatures={list(self.temperatures)}: "
                f"log p at T needs that normaliser; add {self.draws_temperature} to capture.temperatures"
            )
        return self

    @property
    def extra_temperatures(self) -> tuple[float, ...]:
        """The temperatures other than 1, ascending."""
        return tuple(t for t in self.temperatures if t != 1.0)


class AuditSection(Section):
    sequences: Placement[int] = Field(default=8, ge=0)
    """Stored sequences compared with the teacher's second answer before training, one of each unit before a second of
    any; 0: train unaudited."""
    units: Placement[Listed[tuple[str, ...]]] = ()
    """Units (hashes) scored again whole, instead of a sample."""
    engine: Placement[Literal["auto", "vllm", "transformers"]] = "auto"
    """`vllm`: its public path, never the one inside its workers; `transformers`: the dense reference; both load the
    teacher once more. `auto`: that of teacher.engine, by the capture's own teachers as far as these answered twice."""

    @property
    def is_on(self) -> bool:
        """Whether anything is scored again."""
        return bool(self.sequences or self.units)

    @property
    def sampled(self) -> int:
        """Sequences for which teachers that capture answer a second time."""
        return self.sequences if self.engine == "auto" else 0


class EvaluateSection(Section):
    ece_bins: Identity[int] = Field(default=15, ge=2, le=1000)
    """Equal-width confidence bins of the expected calibration error."""
    max_sequences: Identity[int] = Field(default=2000, ge=1)
    """Held-out sequences scored, the first ones by document hash."""
    batch_packs: Placement[int] = Field(default=1, ge=1)
    """Packed rows of one forward pass."""
    require: Placement[dict[str, Required]] = Field(default_factory=dict)
    """Bounds on the trained student: `kl_t1`, `perplexity`, `ece` at most; `top1_agreement`, `acceptance` at least.
    Any other number of report.json by its dotted name, with `{ max = … }`, `{ min = … }`, or against the version that
    is the latest `{ max_rise = … }`, `{ max_drop = … }`."""
    on_other_holdout: Placement[Literal["warn", "fail"]] = "warn"
    """What a bound against the latest version does where the two were not scored on the same held-out sequences and
    teacher: `warn`: it is not judged, and the report says so; `fail`: it counts as missed."""

    drift_warn: Placement[float | None] = Field(default=None, ge=0)
    """Warn where the held-out tokens' frequencies are further than this from the latest version's, in nats of
    Jensen–Shannon divergence, 0 to 0.69; compare it with the report's `held_out_token_js_by_chance`. None: never."""

    @field_validator("require", mode="before")
    @classmethod
    def _dotted(cls, value: object) -> object:
        return flattened(value)

    @model_validator(mode="after")
    def _bounds_are_of_figures(self) -> Self:
        if problems := problems_of(self.require):
            raise ValueError("; ".join(problems))
        return self

    def bounds(self) -> dict[str, Any]:
        """What a report is judged by, as plain JSON values; a bare number as it is."""
        return {name: self._bound(bound) for name, bound in self.require.items()}

    def _bound(self, bound: float | Bound) -> Any:
        if not isinstance(bound, Bound):
            return bound
        stated: dict[str, Any] = bound.stated()
        return stated | ({"on_other_holdout": self.on_other_holdout} if stated.keys() & RELATIVE else {})


class ExportSection(Section):
    dtype: Identity[Literal["bfloat16", "float32", "float16"]] = "bfloat16"
    """Type of the published weights."""
    licence: Placement[str] = "unknown"
    """Licence stated on the model card; the teacher's licence usually binds the student."""
