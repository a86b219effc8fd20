"""`[student]` and `[train]`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from distill_ray.config.kinds import AddedIdentity, Identity, Listed, Placement, Section
from distill_ray.config.values import Fraction, Range, Uri

Weight = Annotated[float, Field(ge=0, le=1000)]


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
    freeze: AddedIdentity[Listed[tuple[str, ...]]] = ()
    """Weights that stay as they are, by name or glob: `["model.embed_tokens.*", "model.layers.[0-3].*"]`."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [n for n in ("model", "teacher_layers", "config") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"state exactly one of model, teacher_layers, config; got {given or 'none'}")
        if self.lora and self.freeze:
            raise ValueError("lora trains its adapters alone, so freeze has nothing to keep; remove one of them")
        return self


class TrainSection(Section):
    epochs: Identity[int] = Field(default=1, ge=1)
    """Passes over the training targets."""
    mix: AddedIdentity[dict[Uri, Weight]] = Field(default={})
    """How many times each epoch takes the sequences of a source, by URI or glob: `{ "s3://acme/rare/*" = 2.0 }`; 0 to
    1,000, 1 for sources it does not name. A fraction takes another part of the documents in every epoch."""
    max_steps: AddedIdentity[int | None] = Field(default=None, ge=1)
    """Optimizer steps after which the run ends, though its epochs hold more; the schedule ends there, too."""
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
    schedule: AddedIdentity[Literal["cosine", "linear", "constant", "wsd"]] = "cosine"
    """How the rate falls behind the warm-up: by half a cosine, in a line, not at all, or (warmup, stable, decay) in a
    line over the last `decay_fraction` of the steps."""
    decay_fraction: AddedIdentity[Fraction] = 0.2
    """Share of the steps over which `wsd` falls."""
    final_lr_fraction: Identity[Fraction] = 0.1
    """Where the rate ends, as a share of the peak; `constant` stays at the peak."""
    weight_decay: Identity[float] = Field(default=0.0, ge=0)
    """Decoupled weight decay, of matrices: norms and biases have none."""
    betas: Identity[Listed[tuple[Fraction, Fraction]]] = (0.9, 0.95)
    """Adam's moment decay rates."""
    clip_norm: Identity[float] = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0: they never are."""
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
    peak_tflops: Placement[float | None] = Field(default=None, gt=0)
    """Dense TFLOP/s of one worker's device in the arithmetic of `precision`, for the MFU; None: those of a known GPU in
    bf16, and no MFU anywhere else."""
    checkpoint_every: Placement[int] = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Placement[int] = Field(default=2, ge=1)
    """Newest checkpoints kept, beside the best."""
    keep_every: Placement[int] = Field(default=0, ge=0)
    """Also keep every so many-th checkpoint, those of steps that keep_every × checkpoint_every divides; 0: none."""
    keep_checkpoints_after_export: Placement[bool] = False
    """Keep them for good. Else nothing refers to them once the student is exported, and `gc` removes them."""
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
    def _rises_before_it_falls(self) -> Self:
        if self.schedule != "wsd" and self.decay_fraction != type(self).model_fields["decay_fraction"].default:
            raise ValueError(
                f'decay_fraction={self.decay_fraction} has no effect on schedule = "{self.schedule}"; remove it or use '
                '"wsd"'
            )
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} are more than all "
                "steps; lower one of them"
            )
        return self

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
