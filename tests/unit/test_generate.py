"""Prompts and completions without an engine: recipe, prompts of a unit, seeds, ends, storage, audit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray import targets
from distill_ray.audit.source import compare_completion, compare_source
from distill_ray.capture.stages import ReadUnit, teach
from distill_ray.config import identity_of, parse_recipe
from distill_ray.config.generate import GenerateSection
from distill_ray.config.sections import CaptureSection, CorpusSection
from distill_ray.corpus import load_tokenizer, plan_units, read_unit_prompts
from distill_ray.corpus.probe import probe_sources
from distill_ray.errors import IntegrityError, UserError
from distill_ray.schema import Sequence, TargetRows
from distill_ray.storage import find_sources, open_storage
from distill_ray.targets import StoredSequence
from distill_ray.targets.layout import checksum
from distill_ray.teacher.generation import Answer, Completion, answers, joined, sample_seed, writing_of
from distill_ray.teacher.transformers_generation import draw
from tests.assets import tiny_tokenizer_folder
from tests.unit.targets_fakes import exact_rows, identity, unit

RECIPE: dict[str, Any] = {
    "name": "g",
    "storage": {"root": "/tmp/none"},
    "corpus": {"sources": ["/tmp/none/*.jsonl"], "window_tokens": 64},
    "teacher": {"model": "/tmp/none"},
    "student": {"teacher_layers": [0]},
}
GENERATE = GenerateSection(samples=2, max_tokens=16)
END = 2


def _recipe(**capture: Any) -> Any:
    return parse_recipe({**RECIPE, "capture": {"mode": "generate", **capture}})


def test_defaults_stated_or_not_are_one_identity_and_scoring_keeps_its_own() -> None:
    bare = _recipe(generate={"max_tokens": 16})
    stated = _recipe(generate={"max_tokens": 16, "samples": 1, "temperature": 1.0, "stop": []})
    assert identity_of(bare.capture) == identity_of(stated.capture)
    assert CaptureSection(mode="generate").generate == GenerateSection()
    # The words that a capture had before there was generation.
    assert set(identity_of(CaptureSection())) == {"top_k", "temperatures"}


@pytest.mark.parametrize(
    ("capture", "says"),
    [
        ({"mode": "score", "generate": {"samples": 2}}, 'no effect with mode="score"'),
        ({"generate": {"max_tokens": 64}}, "leaves no room for a prompt"),
        ({"generate": {"max_tokens": 16, "samples": 3, "temperature": 0}}, "copies of one completion"),
        ({"generate": {"max_tokens": 16, "temperature": 0.001}}, "below 0.01"),
        ({"generate": {"max_tokens": 16, "stop": ["a", ""]}}, "empty stop text"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(capture: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        _recipe(**capture)


# Prompts of a unit.


def _section(path: Path, form: str = "text", **more: Any) -> CorpusSection:
    return CorpusSection.model_validate({"sources": [str(path)], "format": form, "window_tokens": 64, **more})


def _prompts(path: Path, form: str, records: list[Any], generate: GenerateSection = GENERATE, **more: Any) -> Any:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    section = _section(path, form)
    (planned,) = plan_units(section, "tok", None, prompts=True)
    tokenizer = load_tokenizer(tiny_tokenizer_folder(), False)
    return tokenizer, *read_unit_prompts(planned, section, generate, tokenizer, **more)


def test_each_format_gives_what_stands_before_the_answer(tmp_path: Path) -> None:
    tokenizer, (text,), dead = _prompts(tmp_path / "a.jsonl", "text", [{"text": "A question?"}])
    assert tokenizer.decode(text.tokens) == "A question?"
    assert not text.loss_mask.any()
    assert not dead
    _, (pair, same), _ = _prompts(
        tmp_path / "b.jsonl", "prompt_completion", [{"prompt": "Why?"}, {"prompt": "Why?", "completion": "So."}]
    )
    assert tokenizer.decode(pair.tokens) == "Why?"
    assert pair.doc_key == same.doc_key, "a completion that is not used decides what is held out"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"}]
    answered = [*chat, {"role": "assistant", "content": "dropped"}]
    _, (open_, closed), _ = _prompts(tmp_path / "c.jsonl", "messages", [{"messages": chat}, {"messages": answered}])
    assert tokenizer.decode(open_.tokens).endswith("<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n")
    assert "Yo<|im_end|>" in tokenizer.decode(open_.tokens)
    np.testing.assert_array_equal(open_.tokens, closed.tokens)


def test_what_is_no_prompt_becomes_a_dead_letter_with_its_record(tmp_path: Path) -> None:
    records = [{"text": "good"}, {"text": " "}, {"text": "much too long " * 40}, {"other": 1}, {"text": "fine"}]
    _, prompts, dead = _prompts(tmp_path / "a.jsonl", "text", records)
    assert len(prompts) == 2
    assert [d.record for d in dead] == [1, 2, 3]
    assert (
        "leaves no room for capture.generate.max_tokens=16 in corpus.window_tokens=64; it may have 48" in dead[1].reason
    )
    said = [{"messages": [{"role": "assistant", "content": "x"}]}]
    assert "no turn to answer" in _prompts(tmp_path / "b.jsonl", "messages", said)[2][0].reason


def test_a_unit_whose_answers_may_be_too_many_is_refused_before_any_is_written(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "two"}]
    _, prompts, _ = _prompts(tmp_path / "a.jsonl", "text", records)
    most = sum(2 * (len(p.tokens) + 16) for p in prompts)
    assert len(_prompts(tmp_path / "a.jsonl", "text", records, most_tokens=most)[1]) == 2
    with pytest.raises(UserError, match=r"2 prompts, whose 2 completion.* lower corpus.unit_bytes"):
        _prompts(tmp_path / "a.jsonl", "text", records, most_tokens=most - 1)


def test_units_of_prompts_are_others_and_need_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    section = _section(path, "prompt_completion")
    (asked,) = plan_units(section, "tok", None, prompts=True)
    probe_sources(section, find_sources([str(path)]), prompts=True)
    for look in (
        lambda: plan_units(section, "tok", None),
        lambda: probe_sources(section, find_sources([str(path)])),
    ):
        with pytest.raises(UserError, match=r"needs \['completion'\]"):
            look()
    path.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    (scored,), (answered,) = plan_units(section, "tok", None), plan_units(section, "tok", None, prompts=True)
    assert len({asked.hash, scored.hash, answered.hash}) == 3


# Writing.


def test_a_seed_is_of_recipe_prompt_and_place_and_of_nothing_else() -> None:
    prompt = np.array([5, 6, 7], np.int32)
    seeds = {sample_seed(GENERATE, prompt, i) for i in range(50)}
    assert len(seeds) == 50
    assert all(0 <= s < 2**63 for s in seeds)
    assert sample_seed(GENERATE, prompt.astype(np.int64), 1) == sample_seed(GENERATE, prompt, 1) == 7301974686806227173
    assert sample_seed(GENERATE.model_copy(update={"seed": 1}), prompt, 1) not in seeds
    assert sample_seed(GENERATE, prompt[:2], 1) not in seeds
    assert sample_seed(GENERATE.model_copy(update={"max_tokens": 9}), prompt, 1) in seeds


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_tokenizer_folder(), tmp_path / "endless")
    capture = CaptureSection(mode="generate")
    writing = writing_of(capture, folder, False)
    assert writing
    assert writing.ends == (END,)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no completion would end; state eos_token_id"):
        writing_of(capture, folder, False)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 0.8)])
def test_the_references_draws_have_the_distribution_asked_for(temperature: float, top_p: float) -> None:
    z = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    p = (z.double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
    want = torch.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    generator = torch.Generator().manual_seed(1)
    n = 8_000
    counts = np.bincount([draw(z, temperature, top_p, generator) for _ in range(n)], minlength=40)
    assert (counts[want.numpy() == 0] == 0).all()
    seen = want.numpy() * n >= 5
    chi2 = ((counts - n * want.numpy()) ** 2 / np.maximum(n * want.numpy(), 1e-9))[seen].sum()
    assert chi2 < seen.sum() + 5 * np.sqrt(2 * seen.sum())
    assert draw(z, 0, 1.0, generator) == int(z.argmax())


# Into the store.


def _rows(of: targets.CaptureIdentity, tokens: np.ndarray) -> TargetRows:
    logits = np.random.default_rng(0).normal(0, 3, (len(tokens) - 1, of.vocab_size))
    return exact_rows(logits, tokens[1:], of.top_k, of.extra_temperatures)


class Writer:
    """Answers each prompt with two completions: one that ends, one that is cut (or dropped for the second prompt)."""

    version, notes = "made up", ()

    def __init__(self, of: targets.CaptureIdentity) -> None:
        self._of = of

    def score(self, sequences: list[np.ndarray]) -> Any:
        raise AssertionError("prompts are not scored as they are")

    def answer(self, prompts: list[np.ndarray]) -> list[list[Answer | str]]:
        written: list[list[Completion | str]] = [
            [Completion(np.array([7, 8, END], np.int32), "stop"), Completion(np.array([9, 9], np.int32), "length")]
            for _ in prompts
        ]
        written[1][1] = "prompt 1, completion 1: not finished"
        pairs = zip(prompts, written, strict=True)
        rows = [_rows(self._of, joined(p, c)) for p, found in pairs for c in found if isinstance(c, Completion)]
        return answers(prompts, written, rows)


OF = replace(identity(), generate={**GENERATE.model_dump(mode="json"), "end_tokens": [END]})


def _taught() -> Any:
    prompts = [Sequence(np.arange(3, 3 + n, dtype=np.int32), np.zeros(n, bool), 100 + n) for n in (1, 4, 6)]
    return prompts, teach(Writer(OF), ReadUnit(unit(), prompts, [], prompts=True))  # type: ignore[arg-type]


def test_completions_alone_are_supervised_and_keep_why_they_ended() -> None:
    _, taught = _taught()
    assert [s.finish for s in taught.sequences] == ["stop", "length", "stop", "stop", "length"]
    assert [s.doc_key for s in taught.sequences] == [101, 101, 104, 106, 106]
    assert taught.sequences[0].loss_mask.tolist() == [False, True, True, True]
    assert taught.sequences[4].loss_mask.tolist() == [False] * 6 + [True] * 2
    assert [len(r.ids_NK) for r in taught.rows] == [len(s.tokens) - 1 for s in taught.sequences]
    assert [d.reason for d in taught.dead] == ["prompt 1, completion 1: not finished"]


def test_ends_are_stored_counted_and_covered_by_the_checksums(tmp_path: Path) -> None:
    _, taught = _taught()
    data, summary = targets.encode_unit(OF, taught.unit, taught.sequences, taught.rows, taught.dead, 1.0)
    assert summary.unfinished == 2
    storage = open_storage(str(tmp_path))
    storage.put(targets.unit_key(OF, taught.unit.hash), data)
    read = targets.read_unit(storage, OF, taught.unit.hash)
    assert [read.sequence(i).finish for i in range(len(read))] == [s.finish for s in taught.sequences]
    assert read.summary().unfinished == 2
    one = read.sequence(0)
    assert checksum("f", "u", 0, one) != checksum("f", "u", 0, replace(one, finish="length"))
    targets.append_index(storage, OF, [summary])
    (indexed,) = targets.load_index(storage, OF).values()
    assert indexed.unfinished == 2
    shown = targets.inspect(f"{tmp_path}/targets/{OF.fingerprint}").render()
    assert "3 came to an end, 2 were cut by max_tokens" in shown


@pytest.mark.parametrize("finish", [None, "abort"])
def test_a_completion_without_its_end_is_not_stored_and_other_tokens_have_none(finish: str | None) -> None:
    _, taught = _taught()
    wrong = [replace(s, finish=finish) for s in taught.sequences]
    with pytest.raises(IntegrityError, match="expected stop or length"):
        targets.encode_unit(OF, taught.unit, wrong, taught.rows, [], 1.0)
    with pytest.raises(IntegrityError, match="expected none"):
        targets.encode_unit(identity(), taught.unit, taught.sequences, taught.rows, [], 1.0)


def test_how_prompts_are_answered_decides_the_capture() -> None:
    plain = identity()
    assert plain.fingerprint == replace(plain, generate=None).fingerprint != OF.fingerprint
    other = replace(OF, generate={**dict(OF.generate or {}), "seed": 1})
    assert other.fingerprint != OF.fingerprint
    assert targets.CaptureIdentity.from_dict(json.loads(json.dumps(OF.to_dict()))) == OF
    assert "generate" not in plain.to_dict()


# The audit.


def _stored(s: Sequence) -> StoredSequence:
    n = len(s.tokens) - 1
    empty = np.zeros(n, np.float16)
    return StoredSequence(s.tokens, s.loss_mask, s.doc_key, np.zeros((n, 4), np.uint8), empty, empty, None, {})


PROMPT = Sequence(np.array([3, 4, 5], np.int32), np.zeros(3, bool), 7)
WRITTEN = Sequence(np.array([3, 4, 5, 8, 9, 2], np.int32), np.arange(6) >= 3, 7, "stop")


@pytest.mark.parametrize(
    ("change", "position", "says"),
    [
        (lambda s: replace(s, tokens=np.array([3, 6, 5, 8, 9, 2], np.int32)), 1, "token 1 is 6 stored and 4"),
        (lambda s: replace(s, loss_mask=np.arange(6) >= 2), 2, "is supervised as stored"),
        (lambda s: replace(s, loss_mask=np.arange(6) >= 4), 3, "is not supervised as stored"),
        (lambda s: replace(s, doc_key=8), 0, "held out"),
        (lambda s: replace(s, tokens=s.tokens[:3], loss_mask=s.loss_mask[:3]), 3, "the prompt alone has 3"),
    ],
)
def test_the_audit_finds_what_is_not_the_prompt_with_a_completion(
    change: Callable[[Sequence], Sequence], position: int, says: str
) -> None:
    assert compare_completion(_stored(WRITTEN), PROMPT) is None
    found = compare_completion(_stored(change(WRITTEN)), PROMPT)
    assert found is not None
    assert found.position == position
    assert says in found.what


def test_the_audit_passes_over_dropped_completions_and_misses_no_lost_one() -> None:
    prompts, taught = _taught()
    asked = [p for p in prompts for _ in range(2)]

    class Kept:
        def __init__(self, sequences: list[Sequence]) -> None:
            self.dead, self._kept = taught.dead, [_stored(s) for s in sequences]

        def __len__(self) -> int:
            return len(self._kept)

        def sequence(self, i: int) -> StoredSequence:
            return self._kept[i]

    assert compare_source(Kept(taught.sequences), asked, compare_completion) is None  # type: ignore[arg-type]
    lost = compare_source(Kept(taught.sequences[:-1]), asked, compare_completion)  # type: ignore[arg-type]
    assert lost is not None
    swapped = [taught.sequences[3], *taught.sequences[1:3], taught.sequences[0], taught.sequences[4]]
    assert compare_source(Kept(swapped), asked, compare_completion) is not None  # type: ignore[arg-type]
