"""What the `quality` bench is made of: real text, a teacher and students trained on it, and targets of every kind.

The text is that of the standard library: its reference prose and its modules' sources. Legend: W windows of L tokens,
each with L − 1 rows; N rows, K kept, M drawn, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distill_ray import codec
from distill_ray.ingest.drawn import PaddedDraws
from distill_ray.losses import LossSpec, SparseTargets, head_loss
from distill_ray.schema import COUNT_SHIFT
from distill_ray.teacher.draws import DrawSpec, draw_from_logits
from distill_ray.teacher.seeds import row_keys, sequence_hash
from distill_ray.teacher.transformers_engine import rows_from_logits
from tests.assets import corpus_folder

VOCAB, LENGTH, BATCH = 8192, 128, 4
ROWS = LENGTH - 1
ECE_BINS = 15


def documents() -> list[str]:
    """Reference prose and modules of the standard library, in the order of their hashes: any part is a fair sample."""
    found = [json.loads(line)["text"] for part in corpus_folder().glob("*.jsonl") for line in part.open()]
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(root).parts):
            found.append(path.read_bytes().decode("utf-8", "replace"))
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())


def windows(wanted: tuple[int, ...]) -> list[Tensor]:
    """Disjoint parts of the text as int64 [W, L], each of about the tokens asked for; no document is in two of them.

    The tokenizer is a byte-level BPE of VOCAB ids, trained on the documents themselves.

    Raises:
        SystemExit: the text has fewer tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = documents()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    assert backend.get_vocab_size() == VOCAB
    left, found = iter(texts), []
    for tokens in wanted:
        part = list[int]()
        while len(part) < tokens:
            if (text := next(left, None)) is None:
                raise SystemExit(f"the text ends before {sum(wanted):,} tokens; ask for fewer")
            ids = backend.encode(text).ids
            part += ids[: len(ids) // LENGTH * LENGTH][: 64 * LENGTH]  # no module outweighs the others
        found.append(torch.tensor(part[: tokens // LENGTH * LENGTH]).view(-1, LENGTH))
    return found


def model(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A random Llama with its embedding as head."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def hidden(of: LlamaForCausalLM, windows_WL: Tensor) -> Tensor:
    """Final hidden states of the rows, [W · (L − 1), D]."""
    return of.model(input_ids=windows_WL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)


def batches(count: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(windows, their rows) of each step, in an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for picked in torch.randperm(count, generator=generator).split(BATCH):
            yield picked, (picked[:, None] * ROWS + torch.arange(ROWS)).flatten()


Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states [n, D], head weight [V, D], rows [n]) → sum over the rows."""


def train(of: LlamaForCausalLM, windows_WL: Tensor, objective: Objective, epochs: int, seed: int, peak: float) -> None:
    """AdamW, a cosine from `peak` to a tenth after a twentieth of warm-up; the same batches for every objective."""
    optimizer = torch.optim.AdamW(of.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    steps = epochs * -(-len(windows_WL) // BATCH)
    for step, (picked, rows) in enumerate(batches(len(windows_WL), epochs, seed)):
        done = step / steps
        optimizer.param_groups[0]["lr"] = (
            peak * min(1.0, 20 * (step + 1) / steps) * (0.55 + 0.45 * math.cos(math.pi * done))
        )
        optimizer.zero_grad()
        (objective(hidden(of, windows_WL[picked]), of.lm_head.weight, rows) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(of.parameters(), 1.0)
        optimizer.step()


@dataclass(frozen=True)
class Taught:
    """A teacher's view of some windows: its hidden states, from which its logits come again at any time."""

    windows_WL: Tensor
    hidden_ND: Tensor
    weight_VD: Tensor

    @classmethod
    def by(cls, teacher: LlamaForCausalLM, windows_WL: Tensor) -> Taught:
        with torch.no_grad():
            return cls(
                windows_WL,
                torch.cat([hidden(teacher, part) for part in windows_WL.split(BATCH)]),
                teacher.lm_head.weight.detach().clone(),
            )

    @property
    def labels_N(self) -> Tensor:
        return self.windows_WL[:, 1:].flatten()

    def logits(self, rows: Tensor | slice) -> Tensor:
        """[n, V]."""
        return self.hidden_ND[rows] @ self.weight_VD.T

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, logits, int64 keys of their draws), window by window."""
        for number, tokens in enumerate(self.windows_WL):
            rows = slice(number * ROWS, (number + 1) * ROWS)
            yield rows, self.logits(rows), torch.from_numpy(row_keys(sequence_hash(tokens.numpy()), 0, ROWS))


def head_targets(taught: Taught, k: int) -> SparseTargets:
    """The exact top k of every row, once through the codec."""
    parts = list[tuple[np.ndarray, ...]]()
    for rows, logits_RV, _ in taught.parts():
        found = rows_from_logits(logits_RV, taught.labels_N[rows], k, ())
        packed = codec.encode(found.ids_NK, found.logprobs_NK, found.log_tail_N, VOCAB)
        parts.append(codec.decode(packed, k, VOCAB))
    ids, logprobs, tail = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return SparseTargets(ids.long(), logprobs, tail, taught.labels_N)


def exact_targets(logits_RV: Tensor, labels_R: Tensor, k: int) -> SparseTargets:
    """The exact top k, not coded."""
    found = rows_from_logits(logits_RV, labels_R, k, ())
    ids, logprobs, tail = map(torch.from_numpy, (found.ids_NK, found.logprobs_NK, found.log_tail_N))
    return SparseTargets(ids.long(), logprobs, tail, labels_R)


def padded(words_ND: Tensor) -> PaddedDraws:
    """`draw_from_logits`' words as the loader hands draws to the loss."""
    draws = words_ND.shape[1] // 2
    ids, logprobs = words_ND[:, :draws].numpy().view(np.uint32), words_ND[:, draws:].numpy().view(np.float32)
    counts = (ids >> np.uint32(COUNT_SHIFT)).astype(np.int64)
    most = max(1, int((counts > 0).sum(1).max()))
    ids = (ids & np.uint32((1 << COUNT_SHIFT) - 1)).astype(np.int64)
    return PaddedDraws(ids[:, :most], counts[:, :most], logprobs[:, :most].copy())


def drawn_words(logits_RV: Tensor, keys_R: Tensor, spec: DrawSpec, k: int) -> Tensor:
    """Draws by the code of the teacher's workers."""
    top_logprob_R = logits_RV.amax(1) - logits_RV.logsumexp(1)
    return draw_from_logits(spec, logits_RV.clone(), k, keys_R, top_logprob_R)


def drawn_targets(taught: Taught, head: SparseTargets, spec: DrawSpec) -> SparseTargets:
    """Targets of `sampled`, or with `tail_only` of `head_tail`."""
    k = head.ids_NK.shape[1]
    words = torch.cat([drawn_words(logits_RV, keys_R, spec, k) for _, logits_RV, keys_R in taught.parts()])
    return padded(words).targets(head, "tail" if spec.tail_only else "all")


def draws_for(taught: Taught, distinct: float) -> int:
    """How many draws a row give that many distinct ids on average: Σ 1 − (1 − p)^N, over the first windows."""
    p_NV = torch.cat([logits.softmax(1) for _, (_, logits, _) in zip(range(8), taught.parts(), strict=False)]).double()
    count = math.ceil(distinct)
    while count < 400 and float((-torch.expm1(count * torch.log1p(-p_NV))).sum(1).mean()) < distinct:
        count += 1
    return count


def sparse(targets: SparseTargets, objective: str, hard: float = 0.0) -> Objective:
    """The product's loss on sparse targets."""
    spec = LossSpec(VOCAB, objective=objective, hard_label_weight=hard)
    return lambda h, weight, rows: head_loss(h, weight, None, targets.select(rows), spec).objective_sum


def dense(taught: Taught) -> Objective:
    """The full KL, by plain torch."""
    return lambda h, weight, rows: dense_kl(taught.logits(rows))(h, weight, rows)


def dense_kl(logits_RV: Tensor) -> Objective:
    """The full KL to the softmax of these logits, whatever rows are named."""

    def objective(h: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        log_q, log_p = (h @ weight.T).log_softmax(1), logits_RV.log_softmax(1)
        return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)

    return objective


@torch.no_grad()
def scores(student: LlamaForCausalLM, taught: Taught) -> dict[str, float]:
    """Loss, dense KL(teacher ‖ student) and expected calibration error of the likeliest token, over held-out rows."""
    loss, kl, confidence, right = 0.0, 0.0, list[Tensor](), list[Tensor]()
    for part, windows_WL in enumerate(taught.windows_WL.split(BATCH)):
        rows = slice(part * BATCH * ROWS, (part * BATCH + len(windows_WL)) * ROWS)
        log_q, log_p = (
            z.log_softmax(1) for z in (hidden(student, windows_WL) @ student.lm_head.weight.T, taught.logits(rows))
        )
        labels = taught.labels_N[rows]
        loss -= float(log_q.gather(1, labels[:, None]).double().sum())
        kl += float((log_p.exp() * (log_p - log_q)).double().sum())
        best, id_ = log_q.max(1)
        confidence.append(best.exp())
        right.append(id_ == labels)
    return {
        "loss": loss / len(taught.labels_N),
        "kl": kl / len(taught.labels_N),
        "ece": ece(*map(torch.cat, (confidence, right))),
    }


def ece(confidence_N: Tensor, right_N: Tensor) -> float:
    """Σ share · |accuracy − confidence| over equal bins of confidence."""
    bin_N = (confidence_N * ECE_BINS).long().clamp_(max=ECE_BINS - 1)
    gap = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bin_N, right_N.double() - confidence_N.double())
    return float(gap.abs().sum() / len(confidence_N))


def gradient(student: LlamaForCausalLM, windows_WL: Tensor, rows: Tensor, objective: Objective) -> Tensor:
    """Of the mean over rows in all of the student's weights, flat."""
    student.zero_grad()
    (objective(hidden(student, windows_WL), student.lm_head.weight, rows) / len(rows)).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees."""
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    return math.degrees(math.acos(float(cosine.clamp(-1, 1))))
