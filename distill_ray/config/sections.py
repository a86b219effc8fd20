"""The sections of a recipe. Defaults live here; a recipe states only its choices."""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from distill_ray.config.bounds import RELATIVE, Bound, Required, flattened, problems_of
from distill_ray.config.generate import GenerateSection
from distill_ray.config.kinds import AddedIdentity, Identity, Listed, Placement, Section

Fraction = Annotated[float, Field(ge=0, le=1)]


def _absolute(uri: str) -> str:
    # Ray's workers need not share the driver's working folder.
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


Uri = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]
"""Local path (made absolute) or `s3://bucket/key`."""


class Range(Section):
    """An elastic count, `{ min = …, max = … }`."""

    min: Placement[int] = Field(default=1, ge=0)
    """Least number kept while there is work; 0 to 4,096."""
    max: Placement[int] = Field(default=1, ge=1, le=4096)
    """Greatest number; 1 to 4,096."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is greater than max={self.max}; lower min or raise max")
        return self


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
    holdout: Identity[float] = Field(default=0.01, ge=0, le=0.5)
    """Share of source documents kept out of training, chosen by document hash; 0 to 0.5."""
    window_tokens: Identity[int] = Field(default=4096, ge=2, le=1_048_576)
    """Most tokens in one sequence; longer documents become several windows."""
    window_overlap: Identity[int] = Field(default=1, ge=1)
    """Tokens a later window repeats from the one before as context; every token is supervised once. 1 or more."""
    unit_bytes: Identity[int] = Field(default=4 * 2**20, ge=1024)
    """Source bytes (before compression) of one unit of work; about 1 M tokens at the default 4 MiB."""

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
    """Stored sequences scored again before training, one of each unit before a second of any; 0: train unaudited."""
    units: Placement[Listed[tuple[str, ...]]] = ()
    """Units (hashes) scored again whole, instead of a sample."""
    engine: Placement[Literal["auto", "vllm", "transformers"]] = "auto"
    """`vllm`: its public path, never the one inside its workers; `transformers`: the dense reference; `auto`: that of
    teacher.engine."""

    @property
    def is_on(self) -> bool:
        """Whether anything is scored again."""
        return bool(self.sequences or self.units)


class LoraSection(Section):
    rank: Identity[int] = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: Identity[float] = Field(default=32.0, gt=0)
    """Scale of the adapters; the update is multiplied by alpha / rank."""
    targets: Identity[Listed[tuple[str, ...]]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear modules that get an adapter."""


class StudentSection(Section):
    model: Placement[Uri | None] = None
    """Hugging Face folder to start from, local or `s3://`; its content hash is the identity."""
    teacher_layers: Identity[Listed[tuple[int, ...]] | None] = None
    """Start from these layers of the teacher (0-based), with its embeddings, norm and head."""
    config: Placement[Uri | None] = None
    """Folder with a `config.json`: a student with random weights, drawn from train.seed."""
    lora: Identity[LoraSection | None] = None
    """Train low-rank adapters only; they are merged at export."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [n for n in ("model", "teacher_layers", "config") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"state exactly one of model, teacher_layers, config; got {given or 'none'}")
        return self


class TrainSection(Section):
    epochs: Identity[int] = Field(default=1, ge=1)
    """Passes over the training targets."""
    global_batch_tokens: Identity[int] = Field(default=262_144, ge=8)
    """Tokens of one optimizer step over all workers; a multiple of pack_tokens."""
    pack_tokens: Identity[int] = Field(default=4096, ge=8)
    """Tokens of one packed row; at least corpus.window_tokens."""
    micro_batch_packs: Placement[int] = Field(default=1, ge=1)
    """Packed rows of one forward pass on one worker; the rest is gradient accumulation."""
    learning_rate: Identity[float] = Field(default=2e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_fraction: Identity[Fraction] = 0.03
    """Share of the steps over which the rate rises from 0."""
    final_lr_fraction: Identity[Fraction] = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: Identity[float] = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    betas: Identity[Listed[tuple[Fraction, Fraction]]] = (0.9, 0.95)
    """Adam's moment decay rates."""
    clip_norm: Identity[float] = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down."""
    precision: Identity[Literal["bf16", "fp32"]] = "bf16"
    """Arithmetic of the student."""
    seed: Identity[int] = Field(default=0, ge=0)
    """Fixes data order and random weights."""
    on_bad_loss: AddedIdentity[Literal["stop", "skip"]] = "stop"
    """A step whose loss or gradient is not finite, or whose loss is a spike: `stop` ends the run, `skip` leaves weights
    and optimizer as they were and goes on with the next batch; ten in a row end the run."""
    loss_spike: AddedIdentity[float] = Field(default=0.0, ge=0)
    """A spike is a loss above this many times the median of recent steps, above 1; 0: none is."""
    workers: Placement[Range] = Range(min=1, max=1)
    """Ray Train workers. Where min < max, the group is as large as there is room for whenever it is started."""
    settle_s: Placement[float] = Field(default=30.0, ge=0)
    """Where workers.min < workers.max: seconds without a node coming or going before a lost group is started again, so
    that one wave of lost nodes costs one conversion of the checkpoint."""
    grow_after_s: Placement[float] = Field(default=900.0, ge=0)
    """Where workers.min < workers.max: seconds a group runs before it saves and is started again with more workers, if
    there is room for them; counts against max_preemption_failures."""
    zero_stage: Placement[int] = Field(default=2, ge=1, le=3)
    """DeepSpeed ZeRO stage."""
    offload: Placement[bool] = False
    """Keep optimizer state in host memory."""
    gradient_checkpointing: Placement[bool] = False
    """Recompute activations in the backward pass."""
    use_gpu: Placement[bool] = True
    """False: train on CPUs with gloo."""
    checkpoint_every: Placement[int] = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Placement[int] = Field(default=2, ge=1)
    """Newest checkpoints kept, beside the best."""
    keep_every: Placement[int] = Field(default=0, ge=0)
    """Also keep every so many-th checkpoint, those of steps that keep_every × checkpoint_every divides; 0: none."""
    max_failures: Placement[int] = Field(default=3, ge=0)
    """Restarts of the worker group within one command, after failures."""
    max_preemption_failures: Placement[int] = Field(default=-1, ge=-1)
    """Restarts within one command after a node was taken away with notice; -1: any number."""

    @field_validator("workers")
    @classmethod
    def _some(cls, value: Range) -> Range:
        if not value.min:
            raise ValueError("min=0: training needs at least one worker; use min = 1 or more")
        return value

    @field_validator("loss_spike")
    @classmethod
    def _above_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(f"{value} times the median is met by every second step; use more than 1, say 3, or 0")
        return value

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.global_batch_tokens % self.pack_tokens:
            raise ValueError(
                f"global_batch_tokens={self.global_batch_tokens} is not a multiple of pack_tokens={self.pack_tokens}; "
                f"use {max(1, self.global_batch_tokens // self.pack_tokens) * self.pack_tokens}"
            )
        if self.workers.min < self.workers.max > self.packs_per_batch:
            raise ValueError(
                f"workers.max={self.workers.max} exceeds the {self.packs_per_batch} pack(s) of a global batch: some "
                f"workers would never have one; use workers.max = {self.packs_per_batch} or a larger global batch"
            )
        return self

    @property
    def packs_per_batch(self) -> int:
        """Packed rows in one optimizer step, over all workers."""
        return self.global_batch_tokens // self.pack_tokens


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


class CostSection(Section):
    teacher_gpu_hour: Placement[float | None] = Field(default=None, ge=0)
    """Dollars of one GPU of a teacher for an hour; with it, progress and report show what teachers cost."""
    student_gpu_hour: Placement[float | None] = Field(default=None, ge=0)
    """Dollars of one GPU of a training worker for an hour; with it, the report shows what training cost."""
