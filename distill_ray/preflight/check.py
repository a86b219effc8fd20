"""The checks in their order, and those of batches and models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from distill_ray import corpus
from distill_ray.codec import MAX_VOCAB
from distill_ray.config import Recipe
from distill_ray.errors import UserError
from distill_ray.ingest import check_mix
from distill_ray.model_config import ModelShape, model_shape
from distill_ray.preflight.finding import Finding
from distill_ray.preflight.hardware import hardware
from distill_ray.preflight.software import ask_groups, installed_here
from distill_ray.report import check_require
from distill_ray.session import cluster_address, ray_session
from distill_ray.storage import WEIGHT_FILES, check_access, find_sources, is_weights, open_storage, stage_folder
from distill_ray.teacher import resolve_dtype, writing_of


def check(recipe: Recipe, *, address: str | None = None) -> list[Finding]:
    """Check storage, sources, teacher, student, hardware and batch arithmetic, cheapest first.

    Args:
        recipe: a parsed recipe; its own rules already hold.
        address: of a running Ray cluster whose GPUs and CPUs are counted and whose nodes are asked what they have and
            whether they reach the store; None takes RAY_ADDRESS, else this machine.

    Raises:
        UserError: the first thing that is wrong, with its numbers and the remedy.
    """
    check_require(recipe.evaluate.require)
    if not recipe.corpus.holdout:
        raise UserError(
            "corpus.holdout=0 leaves nothing to evaluate the student on; hold out a share of the documents, say 0.01"
        )
    where = cluster_address(address)
    findings = [_batches(recipe), installed_here(recipe, alone=where is None)]
    check_access(recipe.storage.root)
    findings.append(Finding("storage", f"{recipe.storage.root} can be listed, written and deleted"))
    sources = find_sources(recipe.corpus.sources)
    total = sum(info.size for info in sources.values())
    if not total:
        raise UserError(f"the corpus is empty: {len(sources)} source(s), 0 bytes; add text to corpus.sources")
    check_mix(recipe.train.mix, sources)
    corpus.check_unit_bytes(recipe.corpus, recipe.capture.top_k, recipe.capture.draws)
    opened = corpus.probe_sources(recipe.corpus, sources, recipe.capture.generate is not None)
    findings.append(Finding("corpus", f"{len(sources)} source(s), {total:,} bytes; {len(opened)} looked into"))
    findings += _models(recipe)
    with ray_session(where) if where else nullcontext():
        findings.append(hardware(recipe, where))
        return findings + (ask_groups(recipe) if where else [])


def _batches(recipe: Recipe) -> Finding:
    train, packs = recipe.train, recipe.train.packs_per_batch
    at_once = train.workers.max * train.micro_batch_packs
    if packs % at_once:
        raise UserError(
            f"train.global_batch_tokens={train.global_batch_tokens} is {packs} pack(s) of {train.pack_tokens} tokens, "
            f"which {train.workers.max} worker(s) × micro_batch_packs={train.micro_batch_packs} do not divide: some "
            f"would idle; use a multiple of {at_once * train.pack_tokens} tokens or other workers"
        )
    fact = f"{packs} packs a step, {packs // at_once} micro-batch(es) on each of {train.workers.max}"
    if train.workers.min < train.workers.max:
        # Every worker has as many packs as the one with most; the rest are empty.
        idle = {n: 1 - packs / (n * -(-packs // n)) for n in range(train.workers.min, train.workers.max + 1)}
        worst = max(idle, key=lambda n: idle[n])
        fact += f"; with {train.workers.min} to {train.workers.max} workers at most {idle[worst]:.0%} of them idle"
        fact += f", with {worst}" if idle[worst] else ""
    return Finding("batches", fact)


def _models(recipe: Recipe) -> list[Finding]:
    # Configuration and tokenizer only: 140 GB of weights belong on the teacher's own machines.
    teacher_folder = stage_folder(recipe.teacher.model, weights=False)
    _has_weights(recipe.teacher.model)
    shape = model_shape(teacher_folder, recipe.teacher.trust_remote_code)
    _teacher_shape(recipe, shape)
    dtype = resolve_dtype(recipe.teacher, teacher_folder).dtype
    writing_of(recipe.capture, teacher_folder, recipe.teacher.trust_remote_code)
    tokenizer = corpus.load_tokenizer(teacher_folder, recipe.teacher.trust_remote_code)
    if recipe.corpus.format == "messages" and not tokenizer.chat_template:
        raise UserError(
            f'corpus.format = "messages", but the tokenizer of {recipe.teacher.model} has no chat template; '
            "use prompt_completion or an instruct teacher"
        )
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"the teacher's tokenizer has {len(tokenizer):,} entries, its embedding {shape.vocab_size:,} rows; "
            "they do not belong together"
        )
    return [
        Finding("teacher", f"{shape.layers} layers, vocabulary {shape.vocab_size:,}, {dtype}"),
        _student(recipe, shape, tokenizer),
    ]


def _has_weights(uri: str) -> None:
    storage = open_storage(uri)
    if not any(is_weights(info.key) and info.size for info in storage.list("")):
        raise UserError(f"model folder {uri} holds no weights ({', '.join(WEIGHT_FILES)}); copy the model again")


def _teacher_shape(recipe: Recipe, shape: ModelShape) -> None:
    teacher, heads, layers = recipe.teacher, shape.heads, shape.layers
    # Key-value heads are shared out among the ranks, or each is copied to several.
    splits = [d for d in range(1, heads + 1) if heads % d == 0 and (shape.kv_heads % d == 0 or d % shape.kv_heads == 0)]
    if teacher.tensor_parallel not in splits:
        raise UserError(
            f"teacher.tensor_parallel={teacher.tensor_parallel} does not divide the teacher's {heads} attention heads "
            f"({shape.kv_heads} of keys and values); use one of {splits}"
        )
    if teacher.pipeline_parallel > layers:
        raise UserError(f"teacher.pipeline_parallel={teacher.pipeline_parallel} exceeds the teacher's {layers} layers")
    if shape.vocab_size > MAX_VOCAB:
        raise UserError(
            f"the teacher's vocabulary has {shape.vocab_size:,} rows, and codec v1 stores ids below {MAX_VOCAB:,}; "
            "use another teacher"
        )
    if recipe.capture.top_k > shape.vocab_size:
        raise UserError(
            f"capture.top_k={recipe.capture.top_k} exceeds the vocabulary of {shape.vocab_size:,}; lower top_k"
        )
    if recipe.capture.draws_from == "tail" and recipe.capture.top_k == shape.vocab_size:
        raise UserError(
            f'capture.draws_from="tail", but capture.top_k={recipe.capture.top_k} keeps the whole vocabulary and '
            "leaves nothing to draw from; lower top_k"
        )
    longest = shape.context
    if longest and recipe.corpus.window_tokens >= longest:
        raise UserError(
            f"corpus.window_tokens={recipe.corpus.window_tokens}: the teacher's context is {longest} tokens and one is "
            f"kept free; use at most {longest - 1}"
        )


def _student(recipe: Recipe, teacher: ModelShape, tokenizer: Any) -> Finding:
    student = recipe.student
    if student.teacher_layers is not None:
        layers = teacher.layers
        wrong = [i for i in student.teacher_layers if not 0 <= i < layers]
        if wrong or len(set(student.teacher_layers)) != len(student.teacher_layers) or not student.teacher_layers:
            raise UserError(
                f"student.teacher_layers={list(student.teacher_layers)}: the teacher has layers 0 to {layers - 1}; "
                "state each at most once and at least one"
            )
        return Finding("student", f"{len(student.teacher_layers)} of the teacher's {layers} layers")
    origin = student.model or student.config
    assert origin is not None  # the recipe's own rule
    folder = stage_folder(origin, weights=False)
    if student.model is not None:
        _has_weights(student.model)
    shape = model_shape(folder, recipe.teacher.trust_remote_code)
    if shape.vocab_size < len(tokenizer):
        raise UserError(
            f"the student {origin} has a vocabulary of {shape.vocab_size:,} rows, the teacher's tokenizer "
            f"{len(tokenizer):,} entries; a student needs the teacher's tokenizer: choose one of the same family"
        )
    if recipe.loss.needs_draws and shape.vocab_size < teacher.vocab_size:
        # Rows beyond the tokenizer are of small probability each, and over a corpus one of them is drawn.
        raise UserError(
            f'loss.objective = "{recipe.loss.objective}" trains on tokens drawn from all {teacher.vocab_size:,} rows '
            f"of the teacher, and the student {origin} has {shape.vocab_size:,}: the first draw beyond them would end "
            'the training; choose a student with as many rows, or objective = "bucket"'
        )
    if student.model is not None:
        corpus.same_tokenizer(tokenizer, corpus.load_tokenizer(folder, recipe.teacher.trust_remote_code))
    return Finding("student", f"{shape.layers} layers, vocabulary {shape.vocab_size:,}")
