"""Body and head loss as one module, so that DeepSpeed's hooks see every weight that is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill_ray.config.loss import LossSection
from distill_ray.errors import UserError
from distill_ray.ingest.attention import attention_mask, document_bounds
from distill_ray.ingest.batch import PackedBatch
from distill_ray.losses import LossSpec, SparseTargets, head_loss, project

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from distill_ray.student.varlen import Kernel


def loss_spec(
    config: PretrainedConfig, vocab_size: int, loss: LossSection, *, step: int = 0, steps: int = 1
) -> LossSpec:
    """The loss of the recipe at one step, with what the student's head does to its logits (soft-cap, scale).

    Args:
        config: the student's text configuration.
        vocab_size: ids that the softmax runs over (`shared_vocabulary`).
        loss: the recipe's section.
        step: global batch that the schedules of temperature and mix are read at.
        steps: of the whole run.
    """
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return LossSpec(
        vocab_size=vocab_size,
        temperature=loss.temperature_at(step, steps),
        hard_label_weight=loss.hard_label_weight_at(step, steps),
        objective=loss.objective,
        jsd_beta=loss.jsd_beta,
        skew=loss.skew,
        logit_scale=scale / divisor,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def shared_vocabulary(model: PreTrainedModel, teacher_rows: int, top_k: int) -> int:
    """Ids that the student's softmax runs over: those that both models have rows for.

    Models of one family pad their embeddings differently (Qwen2.5: 151,936 and 152,064 rows for 151,665 tokens). Rows
    beyond the teacher's are masked. A row that only the teacher has is of probability 0 under the student, so its mass
    stays in the tail; were it kept, the divergence would be infinite, and reading the targets refuses it.

    Args:
        model: the student.
        teacher_rows: V of the targets.
        top_k: K of the targets.

    Raises:
        UserError: the kept tokens are all that the student has, and no tail is left for the teacher's further rows.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output head; choose a causal language model as student")
    rows = len(head.weight)  # type: ignore[arg-type]
    if rows < teacher_rows and top_k >= rows:
        raise UserError(
            f"capture.top_k={top_k} leaves no tail among the student's {rows} rows, but the teacher has "
            f"{teacher_rows}; capture with top_k of at most {rows - 1}"
        )
    return min(rows, teacher_rows)


class HeadLoss(nn.Module):
    """The head's weight and the loss on it.

    It holds the Parameter itself: ZeRO-3 gathers the direct parameters of a module before its forward, and a weight
    reached through another module would still be an empty shard. A weight tied to the embedding is the same
    Parameter object in both places, so its gradient arrives once, as the sum of both uses.
    """

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, spec: LossSpec) -> None:
        super().__init__()
        self.weight = weight_VD
        self.bias = bias_V
        self.spec = spec

    def forward(self, hidden_ND: Tensor, targets: SparseTargets, spec: LossSpec) -> Tensor:
        """float64 [7]: `LossSums.metrics()`, whose entry 0, the objective, carries the gradient."""
        sums = head_loss(hidden_ND, self.weight, self.bias, targets, spec)
        # One tensor, not a dataclass: ZeRO-3's pre-backward hook finds tensors in tuples and dicts only.
        return torch.cat([sums.objective_sum.double()[None], sums.metrics()[1:]])


class DistillModule(nn.Module):
    """A causal language model without its head's logits: packed batch in, sums of the loss out.

    Args:
        model: the student as Hugging Face made it (adapters included).
        spec: the loss.
        spec_at: the loss at a global batch, where it is scheduled; None: `spec` throughout.
        kernel: attention by document, on the device where batches will be; None: a mask over each pack, anywhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: LossSpec,
        spec_at: Callable[[int], LossSpec] | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"{type(model).__name__} has no linear output head; choose a causal language model as student"
            )
        self.config = model.config.get_text_config()
        self._body_prefix = model.base_model_prefix + "."
        self._head_prefix = _name_of(model, head) + "."
        self._eager = model.config._attn_implementation == "eager"
        _check_head(model, head, spec)
        self._spec_at = spec_at
        self.body = model.base_model
        self.head = HeadLoss(head.weight, head.bias, spec)
        _check_packing(self, model)
        self.masked_because = None if kernel is None else kernel.install(model)
        """Why the kernel cannot stand in for the masks in this model, which keeps them; None where it does."""
        self._by_document = kernel is not None and self.masked_because is None

    def forward(self, batch: PackedBatch) -> Tensor:
        """Sums over the supervised rows of this batch, float64 [7] in the order of `LossSums.metrics()`."""
        spec = self.head.spec if self._spec_at is None else self._spec_at(batch.step)
        return self.head(self.hidden_rows(batch), batch.targets, spec)

    def hidden_rows(self, batch: PackedBatch) -> Tensor:
        """Final hidden states [N, D] of the supervised rows: what the head is applied to."""
        if self._by_document:
            bounds = document_bounds(batch.document_ids) if batch.bounds is None else batch.bounds
            masks = bounds[None, None, None]
        else:
            masks = self._masks(batch.document_ids)
        return self._hidden(batch.input_ids, batch.position_ids, masks).flatten(0, 1)[batch.rows]

    def _hidden(self, ids_BT: Tensor, position_BT: Tensor, masks: Tensor | dict[str, Tensor]) -> Tensor:
        return self.body(
            input_ids=ids_BT, position_ids=position_BT, attention_mask=masks, use_cache=False
        ).last_hidden_state

    def hub_name(self, name: str) -> str:
        """The Hugging Face model's name of one of this module's weights."""
        if name.startswith("body."):
            return self._body_prefix + name.removeprefix("body.")
        return self._head_prefix + name.removeprefix("head.")

    def _masks(self, document_ids: Tensor) -> Tensor | dict[str, Tensor]:
        """Block-causal masks; one for each kind of layer where some attend to a sliding window only."""
        full = attention_mask(document_ids)
        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        length = document_ids.shape[1]
        if window is None or window >= length:
            return self._as_model_wants(full)
        # An explicit mask replaces the model's own, its sliding window included.
        near = torch.ones(length, length, dtype=torch.bool, device=full.device).triu(1 - window)
        masks = {"full_attention": full, "sliding_attention": full & near}
        if not kinds:
            return self._as_model_wants(masks["sliding_attention"])
        return {kind: self._as_model_wants(masks[kind]) for kind in kinds}

    def _as_model_wants(self, mask: Tensor) -> Tensor:
        if not self._eager:
            return mask
        # Eager attention adds the mask to the scores; a boolean one would shift them by 1.
        dtype = self.head.weight.dtype
        lowest = torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: nn.Linear, spec: LossSpec) -> None:
    """Refuse a model whose logits are not what `project` makes of its hidden states.

    An unknown soft-cap, scale or norm between body and head would otherwise train towards the wrong distribution.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=head.weight.device)[None] % spec.vocab_size
    hidden_TD = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = model(input_ids=ids, use_cache=False).logits[0, :, : spec.vocab_size].float()
    model.train(was_training)
    got = project(
        hidden_TD,
        head.weight,
        head.bias,
        vocab_size=spec.vocab_size,
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
    )
    gap = float((got - expected).abs().max())
    if gap > 0.02 * float(expected.abs().max()) + 1e-6:
        raise UserError(
            f"{type(model).__name__}: logits from its hidden states and head differ from its own by {gap:.3g}; it does "
            "something to its logits that distill_ray does not know, and cannot be a student"
        )


_DOCUMENT = 5
"""Tokens of each probe document: more than a short convolution spans."""


def _check_packing(module: DistillModule, model: PreTrainedModel) -> None:
    """Refuse a model in which a document of a pack sees the one before it.

    A mask and positions separate documents for attention alone: the state of a convolution, a state-space layer or a
    linear attention runs on through the pack. Two documents are packed; the second one's hidden states may depend on
    the first one's embeddings by a gradient of exactly 0, whatever the number type, and must be those of the document
    run alone but for rounding.

    Raises:
        UserError: names the model and by how much it leaks.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids_2T = torch.arange(3, 3 + 2 * _DOCUMENT, device=device).view(2, _DOCUMENT) % module.head.spec.vocab_size
    position_2T = torch.arange(_DOCUMENT, device=device).expand(2, _DOCUMENT)
    document_2T = torch.tensor([[0], [1]], device=device).expand(2, _DOCUMENT)
    seen: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
        seen.append(embedded.detach().requires_grad_())
        return seen[-1]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    with torch.enable_grad():
        masks = module._masks(document_2T.reshape(1, -1))
        packed_TD = module._hidden(ids_2T.view(1, -1), position_2T.reshape(1, -1), masks)[0]
        # Weights that differ by column: a normalised state has the same plain sum whatever is in it.
        weight_D = torch.linspace(-1, 1, packed_TD.shape[1], device=device, dtype=packed_TD.dtype)
        (grad,) = torch.autograd.grad((packed_TD[_DOCUMENT:] @ weight_D).sum(), seen[0])
    handle.remove()
    with torch.no_grad():
        alone_TD = model.base_model(input_ids=ids_2T[1:], use_cache=False).last_hidden_state[0].float()
    model.train(was_training)
    if not bool(alone_TD.isfinite().all()):
        raise UserError(
            f"{type(model).__name__}: its hidden states are not finite, so its weights are broken: training diverged "
            "(lower train.learning_rate), or the folder was damaged"
        )
    gap_T = (packed_TD[_DOCUMENT:].detach().float() - alone_TD).norm(dim=1) / alone_TD.norm(dim=1)
    leak = float(grad[0, :_DOCUMENT].abs().max())
    # The median: in bfloat16 a mixture of experts may route single tokens otherwise.
    if leak != 0 or not float(gap_T.median()) <= 0.05:
        raise UserError(
            f"{type(model).__name__}: packed behind another document, a document's hidden states change by "
            f"{float(gap_T.median()):.2g} of their size (gradient {leak:.2g} across the border, 0 is right); models "
            "with convolutions, state-space layers or linear attention cannot be packed and cannot be students here; "
            "choose a student with attention in every layer"
        )
