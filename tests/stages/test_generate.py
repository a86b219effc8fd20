"""Prompts answered by a real teacher: vLLM against the reference, seeds, ends, and the way into the targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill_ray import targets, teacher
from distill_ray.config.generate import GenerateSection
from distill_ray.config.sections import CaptureSection
from distill_ray.corpus import load_tokenizer
from distill_ray.schema import TargetRows
from distill_ray.storage import open_storage
from distill_ray.teacher import Answer
from tests.assets import TINY_VOCAB, tiny_llama_folder
from tests.stages.ask import Question, ask
from tests.stages.jobs import Job, write_documents
from tests.stages.score import prose_sequences, vllm_section

K, WINDOW, LENGTHS = 16, 160, (5, 40, 17, 1, 64, 23, 9, 30)
END = 2
"""The eos of the tiny models."""
GREEDY = GenerateSection(temperature=0, max_tokens=24)
SAMPLED = GenerateSection(samples=3, temperature=1.0, max_tokens=24, seed=5)
LONG = GenerateSection(samples=40, max_tokens=90)
NARROW = GenerateSection(temperature=1.5, top_p=1e-6, max_tokens=24)


def _whole(answers: list[list[Answer | str]]) -> list[list[Answer]]:
    assert all(isinstance(a, Answer) for found in answers for a in found)
    return [[a for a in found if isinstance(a, Answer)] for found in answers]


def _written(answers: list[list[Answer | str]], prompts: list[np.ndarray]) -> list[list[list[int]]]:
    """The completions' ids, after a look at what stands before them."""
    found = []
    for prompt, of in zip(prompts, _whole(answers), strict=True):
        for a in of:
            np.testing.assert_array_equal(a.tokens[: len(prompt)], prompt)
        found.append([a.tokens[len(prompt) :].tolist() for a in of])
    return found


def _assert_ends(answers: list[Answer], prompt: np.ndarray, generate: GenerateSection) -> None:
    for a in answers:
        written = a.tokens[len(prompt) :]
        assert END not in written[:-1], "it went on after its end"
        assert a.finish == ("stop" if written[-1] == END else "length")
        assert 1 <= len(written) <= generate.max_tokens
        assert (a.finish == "stop") or len(written) == generate.max_tokens


@pytest.mark.long
def test_vllm_answers_as_the_reference_does_and_by_seeds_alone(tmp_path: Path) -> None:
    folder = tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)
    prompts = prose_sequences(folder, LENGTHS)
    section = vllm_section(folder)
    stop = load_tokenizer(folder, False).decode([300])  # a text that greedy answers come to sooner or later, or not
    capture = CaptureSection.model_validate({"top_k": K, "mode": "generate", "generate": {"stop": [stop]}})
    other_seed = SAMPLED.model_copy(update={"seed": 6})
    stopping = SAMPLED.model_copy(update={"stop": (stop,), "max_tokens": 90})
    questions = [
        Question(GREEDY, prompts),
        Question(SAMPLED, prompts),
        Question(SAMPLED, prompts[::-1][:5]),
        Question(other_seed, prompts),
        Question(NARROW, prompts),
        Question(LONG, prompts[:2]),
        Question(stopping, prompts),
        Question(GREEDY, [prompts[0], np.zeros(WINDOW - GREEDY.max_tokens + 1, np.int32)]),
    ]
    answers, scored = ask(section, capture, WINDOW, questions, tmp_path)
    greedy, sampled, again, other, narrow = (
        _written(a, q.prompts) for a, q in zip(answers[:5], questions[:5], strict=True)
    )

    reference = section.model_copy(update={"engine": "transformers"})
    exact = teacher.open_engine(reference, capture.model_copy(update={"generate": GREEDY}), WINDOW)
    assert greedy == _written(exact.answer(prompts), prompts)
    assert narrow == greedy, "top_p leaves the likeliest token alone"
    assert again == sampled[::-1][:5], "the batch has a say"
    assert all(len(set(map(tuple, of))) == SAMPLED.samples for of in sampled), "samples repeat each other"
    assert sum(a == b for a, b in zip(sampled, other, strict=True)) == 0, "the seed has no say"

    for of, prompt in zip(_whole(answers[5]), questions[5].prompts, strict=True):
        _assert_ends(of, prompt, LONG)
    finishes = {a.finish for of in _whole(answers[5]) for a in of}
    assert finishes == {"stop", "length"}, "both ends should occur among 80 long completions"

    tokenizer, stopped = load_tokenizer(folder, False), 0
    for of, prompt in zip(_whole(answers[6]), prompts, strict=True):
        for a in of:
            written = a.tokens[len(prompt) :]
            before, text = tokenizer.decode(written[:-1]), tokenizer.decode(written)
            assert stop not in before, "it went on after its stop text"
            if stop in text:
                stopped += 1
                assert a.finish == "stop"
    assert stopped > 0

    assert isinstance(answers[7][0][0], Answer)
    assert answers[7][1] == [
        f"{WINDOW - 23} tokens exceed the teacher's window of {WINDOW - 24}; split it (corpus.window_tokens)"
    ]

    for of, rows in zip(answers, scored, strict=True):
        found = [a for prompt in of for a in prompt if isinstance(a, Answer)]
        for a, r in zip(found, rows, strict=True):
            assert isinstance(r, TargetRows)
            np.testing.assert_array_equal(a.rows.ids_NK, r.ids_NK)
            np.testing.assert_array_equal(a.rows.logprobs_NK, r.logprobs_NK)
            assert len(a.rows.ids_NK) == len(a.tokens) - 1


GENERATE = """[capture]
mode = "generate"
max_refused = 0.05
generate = { samples = 2, max_tokens = 20, seed = 3 }
"""


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("cluster_address")
@pytest.mark.long
def test_a_run_on_prompts_trains_on_what_the_teacher_wrote_alone(tmp_path: Path) -> None:
    write_documents(tmp_path / "data/a.jsonl", 0, 24, chars=80)
    write_documents(tmp_path / "data/b.jsonl", 24, 1, chars=900)  # leaves no room for an answer
    job = Job(tmp_path, str(tmp_path / "root"), audit=4, edits={"[capture]\n": GENERATE})
    first = job.call(command="evaluate")
    entry = job.published()["targets"]
    storage = open_storage(job.root)
    manifest = targets.read_run_manifest(storage, entry)
    tokenizer = load_tokenizer(job.teacher, False)
    assert job.published()["audit"]["passed"]
    assert "sound" in first.stderr
    assert (manifest.sequences, manifest.dead) == (48, 1)
    dead = storage.get("dead-letters/tiny/v1.jsonl").decode()
    assert "leaves no room for capture.generate.max_tokens=20 in corpus.window_tokens=128; it may have 108" in dead
    seen = {"stop": 0, "length": 0}
    for unit in manifest.units:
        stored = targets.read_unit(storage, manifest.identity, unit.unit)
        for i in range(0, len(stored), 2):
            pair = [stored.sequence(i), stored.sequence(i + 1)]
            assert pair[0].doc_key == pair[1].doc_key
            prompts = [s.tokens[~s.loss_mask] for s in pair]
            np.testing.assert_array_equal(*prompts)
            assert len(tokenizer.decode(prompts[0])) > 0
            for s in pair:
                written = s.tokens[s.loss_mask]
                assert 1 <= len(written) <= 20
                assert s.loss_mask[len(prompts[0]) :].all()
                assert (s.finish == "stop") == (written[-1] == END)
                seen[str(s.finish)] += 1
    assert seen["length"] > 0
    report = targets.inspect(f"{job.root}/runs/tiny/v1", verify=True)
    assert (report.sequences, report.unfinished) == (sum(seen.values()), seen["length"])
    assert not report.problems
    assert "were cut by max_tokens" in report.render()
