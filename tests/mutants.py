"""The traps of soft-target distillation as code: each plant must make its named test fail.

A plant replaces one exact piece of source text in a copy of the repository; the originals are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    trap: str
    file: str
    old: str
    """Stands exactly once in `file`."""
    new: str
    test: str
    """Pytest node, or file, of which at least one test must fail."""

    @property
    def name(self) -> str:
        """Short name for the test's id."""
        return self.trap.replace(" ", "-")


UNIT = "tests/unit/"

MUTANTS = (
    Mutant(
        "mask not shifted with the targets",
        "distill_ray/ingest/batch.py",
        "rows = np.flatnonzero(stored.loss_mask[1:])",
        "rows = np.flatnonzero(stored.loss_mask[:-1])",
        UNIT + "test_ingest_loader.py",
    ),
    Mutant(
        "labels not shifted with the targets",
        "distill_ray/ingest/batch.py",
        "stored.tokens[rows + 1]",
        "stored.tokens[rows]",
        UNIT + "test_ingest_loader.py::test_row_t_stands_for_token_t_plus_one",
    ),
    Mutant(
        "the extra entry of a vLLM row is kept",
        "distill_ray/teacher/flat.py",
        "_rank_order(ids[:, 1:], values[:, 1:])",
        "_rank_order(ids[:, :-1], values[:, :-1])",
        UNIT + "test_teacher.py",
    ),
    Mutant(
        "padded vocabulary rows take part",
        "distill_ray/losses/head.py",
        "logits_NV = hidden_ND @ weight_VD[:vocab_size].to(hidden_ND.dtype).T",
        "logits_NV = hidden_ND @ weight_VD.to(hidden_ND.dtype).T",
        UNIT + "test_losses_head.py::test_padded_vocabulary_rows_take_no_part",
    ),
    Mutant(
        "loss normalised by micro-batch",
        "distill_ray/student/engine.py",
        "self.world / batch.supervised",
        "1.0 / max(1, len(batch.rows)) / batch.micro_steps",
        UNIT + "test_student.py::test_accumulated_loss_is_normalised_by_the_whole_batch",
    ),
    Mutant(
        "attention crosses documents",
        "distill_ray/ingest/attention.py",
        "same = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]",
        "same = torch.ones(*document_ids_BT.shape, size, dtype=torch.bool)",
        UNIT + "test_ingest_attention.py",
    ),
    Mutant(
        "cross-entropy crosses documents",
        "distill_ray/ingest/batch.py",
        "rows.add(b * width + at, ref, stored, form.temperature)",
        "rows.add(b * width + at + (number > 0), ref, stored, form.temperature)",
        UNIT + "test_ingest_loader.py",
    ),
    Mutant(
        "positions run on over documents",
        "distill_ray/ingest/batch.py",
        "positions[b, span] = np.arange(ref.length)",
        "positions[b, span] = np.arange(at, at + ref.length)",
        UNIT + "test_ingest_loader.py::test_positions_restart_and_documents_are_numbered",
    ),
    Mutant(
        "another vocabulary is let through",
        "distill_ray/corpus/tokenizers.py",
        "_vocab_problem(teacher.get_vocab(), student.get_vocab())",
        "None",
        UNIT + "test_corpus_tokenizers.py",
    ),
    Mutant(
        "soft-cap ignored",
        "distill_ray/losses/head.py",
        "    if softcap is not None:\n        logits_NV = torch.tanh(logits_NV / softcap) * softcap",
        "    if softcap is not None:\n        pass",
        UNIT + "test_losses_head.py::test_values_and_gradients_equal_the_plain_head",
    ),
    Mutant(
        "NaN from the engine written to the store",
        "distill_ray/targets/validate.py",
        "    _check_finite(rows)\n",
        "",
        UNIT + "test_targets_validate.py::test_broken_rows_are_refused",
    ),
    Mutant(
        "salted hash as identity",
        "distill_ray/corpus/documents.py",
        'return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big")',
        "return hash(canonical) % 2**64",
        UNIT + "test_corpus_reading.py::test_the_same_document_has_the_same_key_wherever_it_lies",
    ),
    Mutant(
        "windows of one document on both sides of the split",
        "distill_ray/corpus/windows.py",
        "tokens[start:stop].astype(np.int32), mask, doc_key)",
        "tokens[start:stop].astype(np.int32), mask, (doc_key + start * 0x9E3779B97F4A7C15) % 2**64)",
        UNIT + "test_corpus_reading.py::test_windows_of_one_document_fall_on_one_side",
    ),
    Mutant(
        "overlap supervised twice",
        "distill_ray/corpus/windows.py",
        "mask[: window_overlap if start else 1] = False",
        "mask[:1] = False",
        UNIT + "test_corpus_windows.py",
    ),
    Mutant(
        "resume numbers files from 0 and overwrites",
        "distill_ray/targets/index.py",
        'index/{len(entries):07d}-{name}.parquet"',
        'index/{0:07d}-{0:032d}.parquet"',
        UNIT + "test_targets_index.py",
    ),
    Mutant(
        "prefix caching left on",
        "distill_ray/teacher/vllm_setup.py",
        '"enable_prefix_caching": False,',
        '"enable_prefix_caching": True,',
        UNIT + "test_teacher.py",
    ),
    Mutant(
        "a thread dies and the run goes on",
        "distill_ray/ingest/loader.py",
        "            return self._pending.popleft().result()\n",
        "            first = self._pending.popleft()\n"
        "            if first.exception() is not None:\n"
        "                raise StopIteration\n"
        "            return first.result()\n",
        UNIT + "test_ingest_loader.py::test_what_the_thread_raises_reaches_the_consumer",
    ),
    Mutant(
        "T squared on the value only",
        "distill_ray/losses/head.py",
        "(((1 - alpha) * T * T, kl_t_N)",
        "(((1 - alpha), kl_t_N + (T * T - 1) * kl_t_N.detach())",
        UNIT + "test_losses_head.py::test_t_squared_is_on_the_gradient",
    ),
    Mutant(
        "renormalised tail stands in at another temperature",
        "distill_ray/ingest/batch.py",
        "self.log_tail_T.append(stored.log_tail_at[temperature][rows])",
        "self.log_tail_T.append(np.full(len(rows), -30.0, np.float32))",
        UNIT + "test_ingest_loader.py::test_row_t_stands_for_token_t_plus_one",
    ),
    Mutant(
        "tail mass by subtraction",
        "distill_ray/losses/partition.py",
        "tail_lse_N - log_z_N, label_N - log_z_N",
        "torch.log1p(-(kept_NK - log_z_N[:, None]).exp().sum(1)), label_N - log_z_N",
        UNIT + "test_losses.py::test_student_whose_kept_mass_rounds_to_one",
    ),
    Mutant(
        "a negative loss clamped to zero",
        "distill_ray/losses/objectives.py",
        "kl_N = torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0).sum(1)",
        "kl_N = torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0).sum(1).clamp(min=0)",
        UNIT + "test_losses.py",
    ),
    Mutant(
        "the tail bucket left out",
        "distill_ray/losses/objectives.py",
        "return kl_N + torch.where(tail_N > 0, tail_N * (log_p_tail_N - log_q_tail_N), 0)",
        "return kl_N",
        UNIT + "test_losses.py",
    ),
    Mutant(
        "an old driver publishes after a takeover",
        "distill_ray/lease/record.py",
        "if (record.epoch, record.owner) != (token.epoch, token.owner):",
        "if False:",
        UNIT + "test_lease.py::test_paused_driver_publishes_nothing_after_a_takeover",
    ),
)
