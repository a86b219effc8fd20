"""The corpus: source objects → stable units → documents → token sequences with their supervision.

Units never depend on where a source lies, and documents fail alone: a bad one becomes a dead letter.
"""

from distill_ray.corpus.index import indexed_sources
from distill_ray.corpus.probe import probe_sources
from distill_ray.corpus.prompts import read_unit_prompts
from distill_ray.corpus.reading import held_out, read_unit_sequences
from distill_ray.corpus.refusals import Refusals
from distill_ray.corpus.sample import Sample, sample_sources
from distill_ray.corpus.shown import Seen, first_documents
from distill_ray.corpus.tokenizers import (
    id_count,
    load_tokenizer,
    same_tokenizer,
    stop_ids,
    tokenizer_identity,
    tokens_without_row,
)
from distill_ray.corpus.units import check_unit_bytes, known_units, most_unit_tokens, plan_units

__all__ = [
    "Refusals",
    "Sample",
    "Seen",
    "check_unit_bytes",
    "first_documents",
    "held_out",
    "id_count",
    "indexed_sources",
    "known_units",
    "load_tokenizer",
    "most_unit_tokens",
    "plan_units",
    "probe_sources",
    "read_unit_prompts",
    "read_unit_sequences",
    "same_tokenizer",
    "sample_sources",
    "stop_ids",
    "tokenizer_identity",
    "tokens_without_row",
]
