"""`distill-ray check`: everything that can be known before money is spent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distill_ray import corpus
from distill_ray.config import Recipe
from distill_ray.errors import UserError
from distill_ray.report import check_require
from distill_ray.storage import check_access, glob_sources, stage_folder


@dataclass(frozen=True)
class Finding:
    """One thing that was checked and found right."""

    what: str
    fact: str


def check(recipe: Recipe, *, address: str | None = None) -> list[Finding]:
    """Check storage, sources, teacher, student, hardware and batch arithmetic, cheapest first.

    Args:
        recipe: a parsed recipe; its own rules already hold.
        address: of a running Ray cluster whose GPUs are counted; None counts this machine's.

    Raises:
        UserError: the first thing that is wrong, with its numbers and the remedy.
    """
    check_require(recipe.evaluate.require)
    findings = [_batches(recipe)]
    findings.append(_installed(recipe))
    check_access(recipe.storage.root)
    findings.append(Finding("storage", f"{recipe.storage.root} can be listed, written and deleted"))
    sources = {uri: info for pattern in recipe.corpus.sources for uri, info in glob_sources(pattern)}
    total = sum(info.size for info in sources.values())
    if not total:
        raise UserError(f"the corpus is empty: {len(sources)} source(s), 0 bytes; add text to corpus.sources")
    findings.append(Finding("corpus", f"{len(sources)} source(s), {total:,} bytes"))
    findings += _models(recipe)
    findings.append(_gpus(recipe, address))
    return findings


def _batches(recipe: Recipe) -> Finding:
    train, packs = recipe.train, recipe.train.packs_per_batch
    at_once = train.workers.max * train.micro_batch_packs
    if packs % at_once:
        raise UserError(
            f"train.global_batch_tokens={train.global_batch_tokens} is {packs} pack(s) of {train.pack_tokens} tokens, "
            f"which {train.workers.max} worker(s) × micro_batch_packs={train.micro_batch_packs} do not divide: some "
            f"would idle; use a multiple of {at_once * train.pack_tokens} tokens or other workers"
        )
    return Finding(
        "batches", f"{packs} packs a step, {packs // at_once} micro-batch(es) on each of {train.workers.max}"
    )


def _installed(recipe: Recipe) -> Finding:
    needed = {"deepspeed": "student", "transformers": "student"}
    if recipe.teacher.engine == "vllm":
        needed["vllm"] = "teacher" if recipe.teacher.use_gpu else "teacher-cpu"
    if recipe.student.lora:
        needed["peft"] = "student"
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise UserError(f"package {package} is not installed here; install distill-ray[{extra}]")
    return Finding("packages", ", ".join(sorted(needed)))


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json; give a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return {**config, **config.get("text_config", {})}


def _models(recipe: Recipe) -> list[Finding]:
    teacher_folder = stage_folder(recipe.teacher.model)
    config = read_config(teacher_folder)
    _teacher_shape(recipe, config)
    tokenizer = corpus.load_tokenizer(teacher_folder, recipe.teacher.trust_remote_code)
    if recipe.corpus.format == "messages" and not tokenizer.chat_template:
        raise UserError(
            f'corpus.format = "messages", but the tokenizer of {recipe.teacher.model} has no chat template; '
            "use prompt_completion or an instruct teacher"
        )
    if len(tokenizer) > config["vocab_size"]:
        raise UserError(
            f"the teacher's tokenizer has {len(tokenizer):,} entries, its embedding {config['vocab_size']:,} rows; "
            "they do not belong together"
        )
    return [
        Finding("teacher", f"{config['num_hidden_layers']} layers, vocabulary {config['vocab_size']:,}"),
        _student(recipe, config, tokenizer),
    ]


def _teacher_shape(recipe: Recipe, config: dict[str, Any]) -> None:
    teacher, heads, layers = recipe.teacher, config["num_attention_heads"], config["num_hidden_layers"]
    if heads % teacher.tensor_parallel:
        divisors = [d for d in range(1, heads + 1) if heads % d == 0]
        raise UserError(
            f"teacher.tensor_parallel={teacher.tensor_parallel} does not divide the teacher's {heads} attention heads; "
            f"use one of {divisors}"
        )
    if teacher.pipeline_parallel > layers:
        raise UserError(f"teacher.pipeline_parallel={teacher.pipeline_parallel} exceeds the teacher's {layers} layers")
    if recipe.capture.top_k > config["vocab_size"]:
        raise UserError(
            f"capture.top_k={recipe.capture.top_k} exceeds the vocabulary of {config['vocab_size']:,}; lower top_k"
        )
    longest = config.get("max_position_embeddings")
    if longest and recipe.corpus.window_tokens >= longest:
        raise UserError(
            f"corpus.window_tokens={recipe.corpus.window_tokens}: the teacher's context is {longest} tokens and one is "
            f"kept free; use at most {longest - 1}"
        )


def _student(recipe: Recipe, teacher_config: dict[str, Any], tokenizer: Any) -> Finding:
    student = recipe.student
    if student.teacher_layers is not None:
        layers = teacher_config["num_hidden_layers"]
        wrong = [i for i in student.teacher_layers if not 0 <= i < layers]
        if wrong or len(set(student.teacher_layers)) != len(student.teacher_layers) or not student.teacher_layers:
            raise UserError(
                f"student.teacher_layers={list(student.teacher_layers)}: the teacher has layers 0 to {layers - 1}; "
                "state each at most once and at least one"
            )
        return Finding("student", f"{len(student.teacher_layers)} of the teacher's {layers} layers")
    origin = student.model or student.config
    assert origin is not None  # the recipe's own rule
    folder = stage_folder(origin)
    config = read_config(folder)
    if config["vocab_size"] < len(tokenizer):
        raise UserError(
            f"the student {origin} has a vocabulary of {config['vocab_size']:,} rows, the teacher's tokenizer "
            f"{len(tokenizer):,} entries; a student needs the teacher's tokenizer: choose one of the same family"
        )
    if student.model is not None:
        corpus.same_tokenizer(tokenizer, corpus.load_tokenizer(folder, recipe.teacher.trust_remote_code))
    return Finding("student", f"{config['num_hidden_layers']} layers, vocabulary {config['vocab_size']:,}")


def _gpus(recipe: Recipe, address: str | None) -> Finding:
    need = recipe.teacher.tensor_parallel * recipe.teacher.pipeline_parallel if recipe.teacher.use_gpu else 0
    train = recipe.train.workers.max if recipe.train.use_gpu else 0
    if not need and not train:
        return Finding("hardware", "CPU only, as the recipe says")
    have = _cluster_gpus(address) if address else _local_gpus()
    if max(have, default=0) < need:
        raise UserError(
            f"one teacher replica needs {need} GPU(s) on one node (tensor_parallel={recipe.teacher.tensor_parallel} × "
            f"pipeline_parallel={recipe.teacher.pipeline_parallel}); nodes here have {have or [0]}; lower them, give "
            "--address of a cluster, or set teacher.use_gpu = false"
        )
    if sum(have) < train:
        raise UserError(
            f"train.workers.max={train} needs as many GPUs; {sum(have)} found; lower it, give --address of a cluster, "
            "or set train.use_gpu = false"
        )
    return Finding("hardware", f"{sum(have)} GPU(s) on {len(have)} node(s)")


def _local_gpus() -> list[int]:
    import torch

    count = torch.cuda.device_count()
    return [count] if count else []


def _cluster_gpus(address: str) -> list[int]:
    import ray

    from distill_ray.session import ray_session

    with ray_session(address):
        return [int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")]
