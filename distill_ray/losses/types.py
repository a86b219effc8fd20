"""What goes into a loss and what comes out. N rows, K kept tokens, V real vocabulary, D hidden size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's kept tokens and tail for N rows, and the tokens that actually came next."""

    ids_NK: Tensor
    """int64 kept ids, most likely first, no id twice in a row."""
    logprobs_NK: Tensor
    """float32 log-probabilities at T = 1."""
    log_tail_N: Tensor
    """float32 log(1 − P) at T = 1, P the kept mass; −inf where nothing is left."""
    labels_N: Tensor
    """int64 actual next token of each row."""
    mask_N: Tensor | None = None
    """bool, True where the row is supervised; None: all are."""
    temperature: float = 1.0
    """The distillation temperature that `logprobs_T` and `log_tail_T` stand at."""
    logprobs_T: Tensor | None = None
    """float32 [N, K] at `temperature`; None at T = 1."""
    log_tail_T: Tensor | None = None
    """float32 [N] at `temperature`; None at T = 1."""
    weights_NK: Tensor | None = None
    """float32 weights of −log q at `temperature`, where the ids hold draws (see `draws`). An id
    may then stand twice in a row. None: the ids are the exact top k."""

    def __post_init__(self) -> None:
        if self.temperature != 1.0 and (self.logprobs_T is None or self.log_tail_T is None):
            # The tail at T cannot be known from the kept tokens: nothing may stand in for it.
            raise ValueError(
                f"targets at temperature {self.temperature} need logprobs_T and log_tail_T; capture that temperature"
            )

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-probabilities [N, K], log tail [N]) at 1 or at the distillation temperature.

        Raises:
            ValueError: any other temperature.
        """
        if temperature == 1.0:
            return self.logprobs_NK, self.log_tail_N
        if temperature == self.temperature and self.logprobs_T is not None and self.log_tail_T is not None:
            return self.logprobs_T, self.log_tail_T
        raise ValueError(f"targets hold temperatures 1 and {self.temperature}, not {temperature}")

    def weights_at(self, temperature: float) -> Tensor | None:
        """Weights of −log q at 1 or at the distillation temperature, None without draws.

        The draws were made at the distillation temperature; p_1 / p_T carries them to T = 1 without bias.
        """
        if self.weights_NK is None or temperature == self.temperature:
            return self.weights_NK
        return self.weights_NK * (self.at(temperature)[0] - self.at(self.temperature)[0]).exp()

    def select(self, rows: slice | Tensor) -> SparseTargets:
        """The targets of some rows."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return SparseTargets(
            self.ids_NK[rows],
            self.logprobs_NK[rows],
            self.log_tail_N[rows],
            self.labels_N[rows],
            of(self.mask_N),
            self.temperature,
            of(self.logprobs_T),
            of(self.log_tail_T),
            of(self.weights_NK),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same targets on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else move(x)

        return SparseTargets(
            move(self.ids_NK),
            move(self.logprobs_NK),
            move(self.log_tail_N),
            move(self.labels_N),
            of(self.mask_N),
            self.temperature,
            of(self.logprobs_T),
            of(self.log_tail_T),
            of(self.weights_NK),
        )


@dataclass(frozen=True)
class LossSpec:
    """Which loss, and what the student's head does between hidden states and logits."""

    vocab_size: int
    """Ids that the softmax runs over; rows of the head beyond it are padding and take no part."""
    temperature: float = 1.0
    """Distillation temperature T."""
    hard_label_weight: float = 0.0
    """α of (1 − α)·T²·KL_T + α·CE."""
    objective: str = "bucket"
    """A name in `OBJECTIVES`."""
    jsd_beta: float = 0.5
    """β of `jsd`, between 0 and 1: the teacher's share of the mixture."""
    skew: float = 0.1
    """s of `skewed_kl`, between 0 and 1: the teacher's share of the mixture."""
    logit_scale: float = 1.0
    """Logits are multiplied by it (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Then logits become softcap·tanh(logits / softcap) (Gemma's `final_logit_softcapping`)."""


@dataclass(frozen=True)
class LossSums:
    """Sums over supervised rows, never means: the trainer divides by the global count of supervised rows.

    A mean taken here would weigh rows by how they fell into micro-batches and ranks.
    """

    objective_sum: Tensor
    """Σ (1 − α)·T²·KL_T + α·CE; the only differentiable one."""
    kl_t_sum: Tensor
    """Σ KL_T, nats, without the T² factor. Float64 like all sums below."""
    kl_t1_sum: Tensor
    """Σ KL at T = 1, nats, comparable across objectives: on {kept tokens, tail}, or estimated from draws."""
    ce_sum: Tensor
    """Σ −log q(actual next token), nats, T = 1."""
    kept_mass_sum: Tensor
    """Σ teacher's kept mass P at T = 1."""
    top1_agree_sum: Tensor
    """Rows where the student's most likely token is the teacher's."""
    count: Tensor
    """Supervised rows."""

    def metrics(self) -> Tensor:
        """The detached sums as one float64 [7] tensor in field order, ready for one all-reduce."""
        return torch.stack(
            [
                self.objective_sum.detach().double(),
                self.kl_t_sum,
                self.kl_t1_sum,
                self.ce_sum,
                self.kept_mass_sum,
                self.top1_agree_sum,
                self.count,
            ]
        )
