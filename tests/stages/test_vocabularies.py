"""A whole run where the teacher has more embedding rows than the student, and both more than the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.assets import TINY_VOCAB, tiny_llama_folder
from tests.stages.jobs import Job

TEACHER_ROWS, STUDENT_ROWS = TINY_VOCAB + 32, TINY_VOCAB + 16


def _with_rows(folder: Path, rows: int) -> Path:
    """The tiny teacher with rows of zeros to pad its embedding: each takes the probability of a logit of 0."""
    import torch
    from transformers import AutoModelForCausalLM

    source = tiny_llama_folder(vocab=TINY_VOCAB)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[TINY_VOCAB:] = 0
    model.save_pretrained(folder)
    for file in source.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.long
@pytest.mark.usefixtures("cluster_address")
def test_a_teacher_whose_padding_was_left_random_teaches_a_student_without_it(tmp_path: Path):
    teacher, student = tiny_llama_folder(vocab=TINY_VOCAB, rows=TINY_VOCAB + 64), tiny_llama_folder(vocab=TINY_VOCAB)
    job = Job(
        tmp_path,
        str(tmp_path / "root"),
        teacher=teacher,
        audit=4,
        edits={"teacher_layers = [0]": f'model = "{student}"'},
    )
    job.call()
    report = job.report()
    assert report["after"]["kl_t1"] < report["before"]["kl_t1"]
    assert report["teacher"]["top1_agreement"] == 1
    assert job.run(command="status").stdout.count("done") == 5


@pytest.mark.long
@pytest.mark.usefixtures("cluster_address")
def test_capture_train_and_evaluate_with_three_vocabulary_sizes(tmp_path: Path):
    teacher, student = _with_rows(tmp_path / "teacher", TEACHER_ROWS), _with_rows(tmp_path / "student", STUDENT_ROWS)
    edits = {"teacher_layers = [0]": f'model = "{student}"', "learning_rate = 1e-3": "learning_rate = 1e-6"}
    job = Job(tmp_path, str(tmp_path / "root"), epochs=1, teacher=teacher, edits=edits)
    job.call(command="evaluate")
    report = job.report()
    # The student is the teacher but for the missing rows, whose mass is in the teacher's tail.
    for figures in (report["before"], report["after"]):
        assert figures["kl_t1"] == pytest.approx(0, abs=1e-3)
        assert figures["top1_agreement"] > 0.99
        assert figures["perplexity"] == pytest.approx(report["teacher"]["perplexity"], rel=0.03)
    assert all(loss == loss for _, loss in job.losses())
