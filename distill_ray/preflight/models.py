"""What a recipe asks of its teacher and student, and whether their folders have it; no weights are brought here."""

from __future__ import annotations

from typing import Any

from distill_ray import corpus
from distill_ray.codec import MAX_VOCAB
from distill_ray.config import Recipe
from distill_ray.errors import UserError
from distill_ray.model_config import ModelShape, model_shape, stated_quantization
from distill_ray.preflight.finding import Finding
from distill_ray.preflight.weights import check_files, check_weights
from distill_ray.storage import stage_folder
from distill_ray.student.frozen import freeze
from distill_ray.student.lora import check_targets
from distill_ray.student.size import student_shell
from distill_ray.teacher import require_ids, resolve_dtype, writing_of


def check_models(recipe: Recipe) -> list[Finding]:
    """Both models by configuration, tokenizer and the names of their weights: 140 GB of these belong on the teacher's
    own machines.

    Raises UserError: the first thing that does not fit.
    """
    model, trust = recipe.teacher.model, recipe.teacher.trust_remote_code
    folder = stage_folder(model, weights=False)
    check_files(model)
    shape = model_shape(folder, trust)
    check_teacher(recipe, shape)
    dtype = resolve_dtype(recipe.teacher, folder).dtype
    writing_of(recipe.capture, folder, trust)
    tokenizer = corpus.load_tokenizer(folder, trust)
    if recipe.corpus.format == "messages" and not tokenizer.chat_template:
        raise UserError(
            f'corpus.format = "messages", but the tokenizer of {model} has no chat template; '
            "use prompt_completion or an instruct teacher"
        )
    unused = corpus.tokens_without_row(tokenizer, shape.vocab_size, "its")
    ids = min(shape.vocab_size, corpus.id_count(tokenizer))
    require_ids(recipe.capture, ids, model)
    unread = check_weights(model, trust, by_vllm=recipe.teacher.engine == "vllm")
    beyond = f" ({shape.vocab_size - ids:,} of them no token's: never kept)" if ids < shape.vocab_size else ""
    fact = f"{shape.layers} layers, vocabulary {shape.vocab_size:,}{beyond}, {dtype}"
    if unused:
        fact += f"; no row for {', '.join(unused)}: a text with it is refused"
    return [Finding("teacher", fact + _unread(unread)), check_student(recipe, shape, tokenizer)]


def check_teacher(recipe: Recipe, shape: ModelShape) -> None:
    """Raises UserError where the recipe asks for a split or a window that the teacher does not have."""
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
    longest = shape.context
    if longest and recipe.corpus.window_tokens >= longest:
        raise UserError(
            f"corpus.window_tokens={recipe.corpus.window_tokens}: the teacher's context is {longest} tokens and one is "
            f"kept free; use at most {longest - 1}"
        )


def check_student(recipe: Recipe, teacher: ModelShape, tokenizer: Any) -> Finding:
    """What the student is.

    Raises UserError where it cannot be made, or not be taught by this teacher.
    """
    section = recipe.student
    found = _cut(recipe, teacher) if section.teacher_layers is not None else _given(recipe, teacher, tokenizer)
    if section.lora is not None:
        check_targets(student_shell(recipe), section.lora)
    if section.freeze:
        freeze(student_shell(recipe), section.freeze)
    return found


def _cut(recipe: Recipe, teacher: ModelShape) -> Finding:
    chosen, layers = recipe.student.teacher_layers or (), teacher.layers
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < layers for i in chosen):
        raise UserError(
            f"student.teacher_layers={list(chosen)}: the teacher has layers 0 to {layers - 1}; "
            "state each at most once and at least one"
        )
    _require_plain(recipe.teacher.model, "student.teacher_layers: the teacher")
    return Finding("student", f"{len(chosen)} of the teacher's {layers} layers")


def _given(recipe: Recipe, teacher: ModelShape, tokenizer: Any) -> Finding:
    section, trust = recipe.student, recipe.teacher.trust_remote_code
    origin = section.model or section.config
    assert origin is not None  # the recipe's own rule
    folder = stage_folder(origin, weights=False)
    if section.model is not None:
        check_files(origin)
    shape = model_shape(folder, trust)
    _require_plain(origin, "the student")
    corpus.tokens_without_row(tokenizer, shape.vocab_size, f"the student {origin}'s")
    if recipe.loss.needs_draws and shape.vocab_size < teacher.vocab_size:
        # Rows beyond the tokenizer are of small probability each, and over a corpus one of them is drawn.
        raise UserError(
            f'loss.objective = "{recipe.loss.objective}" trains on tokens drawn from all {teacher.vocab_size:,} rows '
            f"of the teacher, and the student {origin} has {shape.vocab_size:,}: the first draw beyond them would end "
            'the training; choose a student with as many rows, or objective = "bucket"'
        )
    unread = None
    if section.model is not None:
        corpus.same_tokenizer(tokenizer, corpus.load_tokenizer(folder, trust))
        unread = check_weights(origin, trust)
    fact = f"{shape.layers} layers, vocabulary {shape.vocab_size:,}{_unread(unread)}"
    return Finding("student", fact + _reach(recipe, origin, shape))


def _unread(why: str | None) -> str:
    return f"; names of weights not compared: {why}" if why else ""


def _require_plain(uri: str, what: str) -> None:
    if kind := stated_quantization(stage_folder(uri, weights=False)):
        raise UserError(
            f"{what} in {uri} has quantised weights ({kind}), which cannot be trained as they are; "
            "name a folder with its bfloat16 or float32 weights"
        )


def _reach(recipe: Recipe, origin: str, shape: ModelShape) -> str:
    """What to say of a window longer than the student's positions; nothing where it is not.

    Raises UserError where they are learned: there is none for what lies beyond.
    """
    from torch import nn

    window = recipe.corpus.window_tokens
    if shape.context is None or window <= shape.context:
        return ""
    fact = f"corpus.window_tokens={window} is more than the {shape.context} positions of the student {origin}"
    model = student_shell(recipe)
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    # OPT's table begins with two rows that are no positions.
    if (tables - {model.get_input_embeddings().num_embeddings}) & {shape.context, shape.context + 2}:
        raise UserError(f"{fact}, which are learned one by one; lower it, or choose another student")
    return f"; warning: {fact}, so it learns on positions that it has not seen: what it is worth there is not known"
