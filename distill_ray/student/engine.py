"""DeepSpeed around the student: ZeRO 1/2/3, exact global normalisation, save, load, consolidated weights."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from distill_ray.config.student import TrainSection
from distill_ray.errors import DistillError, UserError
from distill_ray.student.module import DistillModule
from distill_ray.student.schedule import learning_rate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from distill_ray.ingest.batch import PackedBatch
    from distill_ray.student.staging import StagedCheckpoint

_TAG = "state"


@dataclass(frozen=True)
class StepResult:
    """Means over all supervised tokens of one global batch, the same on every rank."""

    loss: float
    kl_t: float
    kl_t1: float
    ce: float
    kept_mass: float
    top1_agreement: float
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Supervised tokens of the global batch."""
    flags: int
    """Sum of the `flag` arguments over ranks: how ranks agree on a stop without another collective."""
    arrived: int = 0
    """Sum of the `arrived` arguments over ranks."""
    leaving: int = 0
    """Number of ranks whose `leave` said yes."""
    batch_id: int = 0
    """`ingest.batch_id` of the sequences that went into it, added up over ranks: the same at any number of them."""
    skipped: int = 0
    """1 where weights and optimizer state are as before the step: its gradients were not finite, or it was refused."""


def engine_config(section: TrainSection, micro_steps: int) -> dict[str, Any]:
    """DeepSpeed's configuration; the optimizer and the schedule are given to it from outside."""
    zero: dict[str, Any] = {"stage": section.zero_stage}
    if section.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": section.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": section.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": section.precision == "bf16"},
        # Sums over micro-batches and ranks in float32, whatever the weights are.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def optimizer_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, for AdamW: matrices with the decay, norms and biases without; one group where there is none."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    parts = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = zip(parts, (weight_decay, 0.0), strict=True)
    return [{"params": part, "weight_decay": decay} for part, decay in groups if part]


class StudentEngine:
    """One rank's view of the training engine. torch.distributed is already initialised.

    Every rank calls every method, in the same order.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        staged: StagedCheckpoint,
        module: DistillModule,
        section: TrainSection,
        device: torch.device,
    ) -> None:
        self._engine, self._module, self._section, self.device = engine, module, section, device
        self._optimizer: Any = engine.optimizer
        self._staged = staged
        self.world = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()

    @classmethod
    def start(cls, module: DistillModule, section: TrainSection, *, micro_steps: int) -> Self:
        """Wrap `module`; its weights are partitioned by the ZeRO stage from here on.

        Args:
            module: the same weights on every rank.
            section: optimizer, precision, ZeRO stage, offload.
            micro_steps: forward passes of one full global batch on one rank.
        """
        if not section.use_gpu:
            # DeepSpeed chooses its accelerator at import; on a machine with GPUs it would choose them.
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        if not section.use_gpu:
            # At first use DeepSpeed would compile an operator for reductions in shared memory, in every process and
            # guarded by a file that a killed one leaves behind. Without it they go through torch, as they do on GPUs.
            deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]

        # All ranks of a node see all its GPUs; DeepSpeed takes the one numbered LOCAL_RANK, and so must the weights.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if section.use_gpu else torch.device("cpu")
        if section.use_gpu:
            torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl" if section.use_gpu else "gloo")
        module.to(device)
        module.train()
        groups = optimizer_groups(module, section.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=engine_config(section, micro_steps),
            dist_init_required=False,
        )
        from distill_ray.student.staging import StagedCheckpoint

        engine.checkpoint_engine = staged = StagedCheckpoint(engine._config)
        return cls(engine, staged, module, section, device)

    def train_step(
        self,
        batches: Iterator[PackedBatch],
        steps: int,
        flag: int = 0,
        arrived: int = 0,
        *,
        leave: Callable[[], bool] = lambda: False,
        skip_above: float | None = None,
    ) -> StepResult:
        """One optimizer step: takes micro-batches up to and including the step's last.

        Args:
            batches: this rank's micro-batches; every rank's step has as many.
            steps: optimizer steps of the run, for the learning rate.
            flag: summed over ranks into the result.
            arrived: likewise.
            leave: asked as late as the step allows; its answers are summed over ranks.
            skip_above: a loss that is not finite or above this one changes neither weights nor optimizer state. The
                same on every rank. None: never asked, and ranks meet once the step is done.

        Raises:
            DistillError: the batch does not hold what was planned.
        """
        sums = torch.zeros(11, dtype=torch.float64, device=self.device)
        signals = (flag, arrived)
        while True:
            batch = next(batches)
            if batch.micro == 0:
                self._set_lr(learning_rate(batch.step, steps, self._section))
            # Said aloud, not left to its counter: the last global batch may have fewer micro-batches.
            self._engine.set_gradient_accumulation_boundary(batch.last)
            part = self._engine(batch.to(self.device))
            sums[:7] += part.detach()
            sums[10] += batch.batch_id
            # DeepSpeed averages gradients over ranks; times the world size that is their sum. Dividing each
            # micro-batch by its own count instead would weigh its tokens by how they were packed.
            scale = self.world / batch.supervised
            if batch.last and skip_above is not None:
                self._reduce(sums, signals, leave)
                if not float(sums[0]) / batch.supervised <= min(skip_above, sys.float_info.max):
                    # No stage has a way to drop gradients that are already accumulated and partitioned, but all of
                    # them drop a step whose gradients are not finite, before the optimizer sees it.
                    scale = math.nan
            self._engine.backward(part[0].float() * scale, scale_wrt_gas=False)
            if batch.last:
                break
        self._engine.step()
        if skip_above is None:
            self._reduce(sums, signals, leave)
        return self._result(sums, batch)

    def _reduce(self, sums: Tensor, signals: tuple[int, int], leave: Callable[[], bool]) -> None:
        sums[7], sums[8], sums[9] = *signals, int(leave())
        torch.distributed.all_reduce(sums)

    def _set_lr(self, lr: float) -> None:
        # The ZeRO wrapper shares these groups with the AdamW it wraps.
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _result(self, sums: Tensor, batch: PackedBatch) -> StepResult:
        *parts, count, flags, arrived, leaving, batch_id = sums.tolist()
        planned = batch.supervised
        if int(count) != planned:
            raise DistillError(
                f"step {batch.step} was planned with {planned} supervised tokens and held {int(count)}: the run "
                "manifest and the stored targets disagree; run `distill-ray inspect --verify` on the targets"
            )
        loss, kl_t, kl_t1, ce, kept, agree = (x / planned for x in parts)
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        lr = float(self._optimizer.param_groups[0]["lr"])
        skipped = not self._engine.was_step_applied()
        figures = (loss, kl_t, kl_t1, ce, kept, agree, lr, norm, planned)
        return StepResult(*figures, int(flags), int(arrived), int(leaving), int(batch_id), int(skipped))

    def stage(self, folder: Path) -> Callable[[], list[Path]]:
        """Copy this rank's part of the state, as it is now, to the host's memory.

        Args:
            folder: where it will be written; no other rank shares it.

        Returns:
            Writes the copy and returns its files. To be called once; any thread may, without the other ranks.
        """
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        write = self._staged.take()

        def files() -> list[Path]:
            write()
            return sorted(p for p in (folder / _TAG).iterdir() if p.is_file())

        return files

    @staticmethod
    def needed(names: Sequence[str], rank: int) -> list[str]:
        """Of all ranks' file names, those that `rank` loads: its own shards and what is common."""
        return [n for n in names if "zero_pp_rank_" not in n or f"zero_pp_rank_{rank}_" in n]

    @staticmethod
    def place(folder: Path) -> Path:
        """Where under `folder` the needed files must lie for `load`."""
        return folder / _TAG

    def load(self, folder: Path, *, universal: bool = False) -> None:
        """Take up the state saved at the same world size and ZeRO stage, or a `universal` one, saved at any size.

        Only for a freshly started engine.
        """
        config: Any = self._engine._config
        config.load_universal_checkpoint = universal
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise DistillError(f"no DeepSpeed state under {folder}; the checkpoint is not whole")

    def export_state(self) -> dict[str, Tensor] | None:
        """All weights on rank 0's CPU in their training type, by their Hugging Face names; None on other ranks."""
        import deepspeed

        state: dict[str, Tensor] = {}
        stage3 = self._section.zero_stage == 3
        for name, tensor in _named_state(self._module):
            params = [tensor] if stage3 and isinstance(tensor, torch.nn.Parameter) else []
            with deepspeed.zero.GatheredParameters(params, modifier_rank=None):
                if self.rank == 0:
                    state[self._module.hub_name(name)] = tensor.detach().cpu().clone()
        return state if self.rank == 0 else None


def check_resumable(saved_stage: int, section: TrainSection, step: int) -> None:
    """Refuse a checkpoint of another ZeRO stage.

    Raises:
        UserError: with both stages and the remedy.
    """
    if saved_stage != section.zero_stage:
        raise UserError(
            f"the checkpoint of step {step} was saved at ZeRO stage {saved_stage}; this command has stage "
            f"{section.zero_stage}. Resume with train.zero_stage = {saved_stage}, or start a new --version"
        )


def _named_state(module: DistillModule) -> list[tuple[str, Tensor]]:
    """Parameters (a tied one under both its names) and persistent buffers, in a fixed order."""
    parameters = list(module.named_parameters(remove_duplicate=False))
    kept = set(module.state_dict(keep_vars=True))
    return parameters + [(n, b) for n, b in module.named_buffers() if n in kept]
