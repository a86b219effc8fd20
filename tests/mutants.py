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
        "the prompt of a completion is supervised",
        "distill_ray/capture/stages.py",
        "np.arange(len(answer.tokens)) >= len(prompt.tokens)",
        "np.arange(len(answer.tokens)) >= 1",
        UNIT + "test_generate.py::test_completions_alone_are_supervised_and_keep_why_they_ended",
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
        "        spec.vocab_size,\n        tuple(weight_of),",
        "        len(weight_VD),\n        tuple(weight_of),",
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
        "rows.add(b * width + at, ref, stored, form)",
        "rows.add(b * width + at + (number > 0), ref, stored, form)",
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
        "        spec.logit_scale,\n        spec.softcap,\n",
        "        spec.logit_scale,\n        None,\n",
        UNIT + "test_losses_head.py::test_values_and_gradients_equal_the_plain_head",
    ),
    Mutant(
        "soft-cap inside attention ignored",
        "distill_ray/model_config.py",
        'return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None',
        "return None",
        UNIT + "test_teacher.py::test_soft_cap_inside_attention_is_honoured",
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
        "Sequence(kept, mask, doc_key)",
        "Sequence(kept, mask, (doc_key + start * 0x9E3779B97F4A7C15) % 2**64)",
        UNIT + "test_corpus_reading.py::test_windows_of_one_document_fall_on_one_side",
    ),
    Mutant(
        "later windows without what opens a text",
        "distill_ray/corpus/reading.py",
        "section.window_overlap, opened)",
        "section.window_overlap)",
        UNIT + "test_cases.py::test_20_every_window_of_a_document_begins_with_bos_unlearned",
    ),
    Mutant(
        "a turn that never stops",
        "distill_ray/corpus/turns.py",
        "return [*ids, *(marks or stops)[:1]]",
        "return ids",
        UNIT
        + "test_corpus_families.py::test_every_turn_stands_behind_the_prompt_that_a_server_gives_for_it_and_ends_once",
    ),
    Mutant(
        "overlap supervised twice",
        "distill_ray/corpus/windows.py",
        "mask[: opening + window_overlap if start > opening else max(1, opening)] = False",
        "mask[: max(1, opening)] = False",
        UNIT + "test_corpus_windows.py",
    ),
    Mutant(
        "resume numbers files from 0 and overwrites",
        "distill_ray/targets/index.py",
        'index/{table.num_rows:07d}-{name}.parquet"',
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
        "torch.logaddexp(counted_NE[:, -1], rest_N) - log_z_N",
        "torch.log1p(-(counted_NE[:, :-1] - log_z_N[:, None]).exp().sum(1))",
        UNIT + "test_losses.py::test_student_whose_kept_mass_rounds_to_one",
    ),
    Mutant(
        "a negative loss clamped to zero",
        "distill_ray/losses/objectives.py",
        "return torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0).sum(1)",
        "return torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), 0).sum(1).clamp(min=0)",
        UNIT + "test_losses_exact.py::test_truncated_goes_below_zero_and_keeps_its_gradient",
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
    Mutant(
        "loss normalised by each rank",
        "distill_ray/student/engine.py",
        "self.world / batch.supervised",
        "1.0 / max(1, len(batch.rows))",
        UNIT + "test_student_ranks.py::test_two_uneven_ranks_step_as_one_process_does",
    ),
    Mutant(
        "logit scale ignored by the loss",
        "distill_ray/losses/tiles.py",
        "            self._hidden_nD = self._hidden_nD * self._in.logit_scale\n",
        "            pass\n",
        UNIT + "test_losses_head.py::test_values_and_gradients_equal_the_plain_head",
    ),
    Mutant(
        "logit scale ignored by the figures",
        "distill_ray/losses/head.py",
        "        logits_NV = logits_NV * logit_scale\n",
        "        pass\n",
        UNIT + "test_student.py::test_packed_hidden_states_and_head_give_each_documents_own_logits",
    ),
    Mutant(
        "logit scale of the model ignored",
        "distill_ray/student/module.py",
        "logit_scale=scale / divisor,",
        "logit_scale=1.0,",
        UNIT + "test_student.py::test_packed_hidden_states_and_head_give_each_documents_own_logits",
    ),
    Mutant(
        "what is staged is the state itself",
        "distill_ray/student/staging.py",
        'value.detach().to("cpu", copy=True)',
        'value.detach().to("cpu")',
        UNIT + "test_student_staging.py::test_nothing_is_shared_with_the_state_and_the_copy_is_equal",
    ),
    Mutant(
        "every epoch takes the same part of a source",
        "distill_ray/ingest/mixing.py",
        "for n in (epoch + 1, epoch)",
        "for n in (1, 0)",
        UNIT
        + "test_ingest_mixing.py::test_whole_weights_count_exactly_and_halves_take_each_document_in_one_of_two_epochs",
    ),
    Mutant(
        "an object of other rows is let through",
        "distill_ray/ingest/units.py",
        "if digest != self._unit.sha256:",
        "if False:",
        UNIT + "test_ingest_loader.py::test_a_unit_that_is_not_the_recorded_one_ends_the_reading",
    ),
    Mutant(
        "resume from the first batch",
        "distill_ray/ingest/loader.py",
        "range(start_step, self._plan.steps)",
        "range(self._plan.steps)",
        UNIT + "test_ingest_loader.py::test_a_resume_goes_on_with_the_very_next_batch",
    ),
    Mutant(
        "uninitialised slots in the packing",
        "distill_ray/ingest/packing.py",
        "pack_of_S[start + longest_first] = chosen",
        "pack_of_S[start + longest_first[1:]] = chosen[1:]",
        UNIT + "test_packing.py",
    ),
    Mutant(
        "padding slots belong to a document",
        "distill_ray/ingest/batch.py",
        "documents = np.full_like(ids, -1)",
        "documents = np.zeros_like(ids)",
        UNIT + "test_ingest_loader.py",
    ),
    Mutant(
        "one vocabulary size for teacher and student",
        "distill_ray/student/module.py",
        "return min(rows, teacher_rows)",
        "return teacher_rows",
        UNIT + "test_vocabularies.py::test_rows_that_only_the_teacher_has_lie_in_the_tail_at_real_sizes",
    ),
    Mutant(
        "a kept id that the student lacks is let through",
        "distill_ray/ingest/batch.py",
        "if form.student_ids is not None and ids.max(initial=-1) >= form.student_ids:",
        "if False:",
        UNIT + "test_vocabularies.py::test_a_kept_id_that_the_student_lacks_is_refused_by_unit_row_and_id",
    ),
    Mutant(
        "a layer's state crosses documents",
        "distill_ray/student/module.py",
        "if leak != 0 or not float(gap_T.median()) <= 0.05:",
        "if False:",
        UNIT + "test_student.py::test_a_model_whose_state_crosses_documents_is_refused",
    ),
    Mutant(
        "dropout left on",
        "distill_ray/student/build.py",
        "dropped = remove_dropout(model)",
        "dropped = [f'{n}={v}' for n, v in vars(model.config).items()]",
        UNIT + "test_student.py::test_a_configuration_with_dropout_trains_without_it",
    ),
    Mutant(
        "an old driver overwrites the history",
        "distill_ray/train/result.py",
        "put_owned(storage, token, key, data)",
        "storage.put(key, data)",
        UNIT + "test_train_result.py::test_an_old_drivers_rank_0_cannot_overwrite_its_successors_history",
    ),
    Mutant(
        "a checkpoint of another plan is resumed",
        "distill_ray/train/restoring.py",
        "if manifest.plan != plan:",
        "if False:",
        UNIT + "test_train_result.py::test_a_checkpoint_of_another_plan_is_refused_with_both_digests",
    ),
    Mutant(
        "drawn from the top k alone",
        "distill_ray/teacher/draws.py",
        "(head_RK[:, -1:] + tail_R1)",
        "head_RK[:, -1:]",
        UNIT + "test_teacher_draws.py::test_draws_have_the_teachers_distribution",
    ),
    Mutant(
        "draws seeded by place in the batch",
        "distill_ray/teacher/spans.py",
        "row_keys(hash_in_name(s.request), s.start, s.count)",
        "row_keys(hash_in_name(s.request), s.offset, s.count)",
        UNIT + "test_worker_capture.py::test_rows_computed_again_have_the_same_seeds",
    ),
    Mutant(
        "what a shard lost to the merge is never drawn",
        "distill_ray/teacher/draws.py",
        "left_RK = torch.where(kept_RK, -torch.inf, values_RK)",
        "left_RK = torch.full_like(values_RK, -torch.inf)",
        UNIT + "test_teacher_draws.py::test_draws_have_the_teachers_distribution",
    ),
    Mutant(
        "tail draws without the tail's mass",
        "distill_ray/losses/draws.py",
        "log_tail_N.exp()[:, None] * counts_NM / total_N1",
        "counts_NM / total_N1",
        UNIT + "test_ingest_draws.py::test_the_loss_on_drawn_tokens_is_unbiased",
    ),
    Mutant(
        "an audit that lets 0.3 nats pass",
        "distill_ray/audit/tolerance.py",
        '"float32": Tolerance(logprob=2e-3,',
        '"float32": Tolerance(logprob=0.4,',
        UNIT + "test_audit.py::test_an_error_of_a_third_of_a_nat_is_found_at_every_rank",
    ),
    Mutant(
        "an audit blind to an id that is left out",
        "distill_ray/audit/rows.py",
        "lost_NR = ~pair.kept_NR & (again.logprobs_NK > least_N1 + 2 * slack)",
        "lost_NR = np.zeros_like(pair.kept_NR)",
        UNIT + "test_audit.py",
    ),
    Mutant(
        "an audit blind to the mask",
        "distill_ray/audit/source.py",
        "other = np.flatnonzero(stored.loss_mask != corpus.loss_mask)",
        "other = np.empty(0, int)",
        UNIT + "test_audit.py::test_a_sequence_that_is_not_the_corpuss_is_found_at_its_first_token",
    ),
    Mutant(
        "an audit by the capture's own teachers after a loaded one failed",
        "distill_ray/audit/verb.py",
        'not last["passed"] and',
        'last["passed"] and',
        UNIT + "test_targets_witness.py::test_the_teacher_is_loaded_where_it_was_not_asked_twice",
    ),
    Mutant(
        "rows scored again by the very path that captured",
        "distill_ray/teacher/hook.py",
        "self.vllms if aside else self.capture",
        "self.capture",
        UNIT + "test_worker_capture.py::test_the_hook_steps_aside_for_vllms_own_method_and_in_again",
    ),
    Mutant(
        "a key with brackets is read as a glob",
        "distill_ray/storage/sources.py",
        "if each.key == path:",
        "if not each.key:",
        UNIT + "test_cases_stores.py",
    ),
    Mutant(
        "a store that ignores If-Match passes",
        "distill_ray/storage/s3_check.py",
        'if probe.write(b"4", IfMatch=version):',
        'if probe.write(b"4", IfMatch=version) and not version:',
        UNIT + "test_storage_odd.py",
    ),
    Mutant(
        "missing weights are made up",
        "distill_ray/causal_lm.py",
        "    if missing:\n",
        "    if missing and other:\n",
        UNIT + "test_cases_models.py::test_27_no_weight_is_made_up_where_check_was_left_out",
    ),
    Mutant(
        "a base student keeps its own end",
        "distill_ray/student/folder.py",
        '"eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),',
        '"eos_token_id": None,',
        UNIT + "test_cases_models.py::test_05_a_base_student_stops_where_its_teacher_does",
    ),
    Mutant(
        "Mistral's own tokenizer wins",
        "distill_ray/storage/model_files.py",
        'return "tokenizer.json" not in names',
        "return True",
        UNIT + "test_cases_models.py::test_29_beside_tokenizer_json_a_tekken_json_is_not_read",
    ),
    Mutant(
        "ids that no token has are kept by the reference",
        "distill_ray/teacher/transformers_engine.py",
        "_top_ids(logits_RV[:, :token_ids], top_k)",
        "_top_ids(logits_RV, top_k)",
        UNIT + "test_cases_models.py::test_30_rows_beyond_the_tokenizer_are_never_kept",
    ),
    Mutant(
        "ids that no token has are kept inside vLLM's workers",
        "distill_ray/teacher/tiles.py",
        "top_k if c.kept else 0",
        "top_k",
        UNIT + "test_teacher_draws.py::test_ids_that_no_token_has_are_drawn_from_the_tail",
    ),
)
