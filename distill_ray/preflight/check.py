"""The checks in their order, and that of batches."""

from __future__ import annotations

from contextlib import nullcontext

from distill_ray import corpus
from distill_ray.config import Recipe
from distill_ray.errors import UserError
from distill_ray.ingest import check_mix
from distill_ray.preflight.finding import Finding
from distill_ray.preflight.hardware import hardware
from distill_ray.preflight.models import check_models
from distill_ray.preflight.software import ask_groups, installed_here
from distill_ray.report import check_require
from distill_ray.session import check_temporary_folder, cluster_address, ray_session
from distill_ray.storage import check_access, find_sources, is_s3


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
    if where is None:
        check_temporary_folder()
    findings = [_batches(recipe), installed_here(recipe, alone=where is None)]
    check_access(recipe.storage.root)
    kept = ", and keeps the conditions of writes" if is_s3(recipe.storage.root) else ""
    findings.append(Finding("storage", f"{recipe.storage.root} can be listed, written and deleted{kept}"))
    sources = find_sources(recipe.corpus.sources)
    total = sum(info.size for info in sources.values())
    if not total:
        raise UserError(f"the corpus is empty: {len(sources)} source(s), 0 bytes; add text to corpus.sources")
    check_mix(recipe.train.mix, sources)
    corpus.check_unit_bytes(recipe.corpus, recipe.capture.top_k, recipe.capture.draws)
    opened = corpus.probe_sources(recipe.corpus, sources, recipe.capture.generate is not None)
    findings.append(Finding("corpus", f"{len(sources)} source(s), {total:,} bytes; {len(opened)} looked into"))
    findings += check_models(recipe)
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
