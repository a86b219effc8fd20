"""Models and exports after public bug reports, each with the one right outcome (`pytest -m cases`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from distill_ray.config import load_recipe
from distill_ray.corpus import load_tokenizer
from distill_ray.errors import UserError
from distill_ray.schema import TargetRows
from distill_ray.storage import stage_folder
from distill_ray.student.build import from_teacher_layers
from distill_ray.student.folder import write_folder
from distill_ray.teacher import open_engine
from tests.assets import tiny_llama_folder, tiny_teacher_folder
from tests.unit.test_cases import Case, prose

pytestmark = pytest.mark.cases


class Models(Case):
    """Prose for a teacher, and a student folder beside it with the teacher's tokenizer."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(folder, capsys)
        self.student = folder / "student"
        self.write(*({"text": prose(40)} for _ in range(48)))
        shutil.copytree(tiny_teacher_folder(), self.student)

    def recipe_for_student(self, more: str = "", **arguments: Any) -> str:
        path = Path(self.recipe("text", **arguments))
        path.write_text(path.read_text().replace("teacher_layers = [0]", f'model = "{self.student}"\n{more}'))
        return str(path)


@pytest.fixture
def case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Models:
    return Models(tmp_path, capsys)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({rename(name): weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})


def gpt2(folder: Path, positions: int) -> None:
    """In place of the model in the folder."""
    (folder / "model.safetensors").unlink()
    config = GPT2Config(vocab_size=512, n_positions=positions, n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)


def exported(teacher: Path, folder: Path) -> dict[str, Any]:
    """The generation config of a student of the teacher's first layer."""
    model = from_teacher_layers(teacher, (0,), torch.float32)
    write_folder(model, model.state_dict(), teacher, folder)
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize(
    "odd",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"length_penalty": 2.0},
        {"output_scores": True},
        {"pad_token_id": -1},
    ],
)
def test_01_a_generation_config_that_contradicts_itself_is_exported_without_what_it_rules_out(
    case: Models, odd: dict[str, Any]
) -> None:
    change(case.folder / "teacher/generation_config.json", eos_token_id=2, **odd)
    found = exported(case.folder / "teacher", case.folder / "out")
    assert not odd.keys() - {"do_sample", "pad_token_id"} & found.keys()
    assert found["eos_token_id"] == 2
    GenerationConfig.from_pretrained(case.folder / "out").validate(strict=True)


@pytest.mark.parametrize("text", ['{"max_new_tokens": 0}', "{"])
def test_01_a_generation_config_that_cannot_be_loaded_is_found_by_check(case: Models, text: str) -> None:
    (case.folder / "teacher/generation_config.json").write_text(text)
    code, said = case.check(case.recipe("text"))
    assert code == 2
    assert "teacher/generation_config.json" in said


def test_01_sampling_that_is_meant_stays(case: Models) -> None:
    change(case.folder / "teacher/generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    found = exported(case.folder / "teacher", case.folder / "out")
    assert (found["temperature"], found["top_p"]) == (0.6, 0.9)


def test_02_adapters_on_a_conv1d_are_refused_by_check(case: Models) -> None:
    gpt2(case.student, 512)
    code, said = case.check(case.recipe_for_student('[student.lora]\nrank = 2\ntargets = ["c_attn"]'))
    assert code == 2
    assert "transformer.h.0.attn.c_attn of GPT2LMHeadModel is of type Conv1D" in said


def test_03_adapters_on_an_embedding_are_refused_by_check(case: Models) -> None:
    code, said = case.check(case.recipe_for_student('[student.lora]\ntargets = ["q_proj", "embed_tokens"]'))
    assert code == 2
    assert "model.embed_tokens of LlamaForCausalLM is of type Embedding" in said


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ('"model.embed_tokens.weight", "layers.0.*"', "no weight of LlamaForCausalLM is named 'layers.0.*'"),
        ('"*"', "student.freeze=['*'] leaves no weight to train"),
    ],
)
def test_weights_that_cannot_be_frozen_are_named_by_check(case: Models, patterns: str, says: str) -> None:
    code, said = case.check(case.recipe_for_student(f"freeze = [{patterns}]"))
    assert code == 2
    assert says in said


@pytest.mark.parametrize("cut", [False, True])
def test_04_quantised_weights_are_not_trained(case: Models, cut: bool) -> None:
    folder = case.folder / "teacher" if cut else case.student
    change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    code, said = case.check(case.recipe("text") if cut else case.recipe_for_student())
    assert code == 2
    assert f"in {folder} has quantised weights (bitsandbytes)" in said


def test_05_a_base_student_stops_where_its_teacher_does(case: Models) -> None:
    for name in ("config.json", "generation_config.json"):
        change(case.student / name, eos_token_id=0)
    change(case.student / "tokenizer_config.json", eos_token="<|endoftext|>")
    change(case.folder / "teacher/generation_config.json", eos_token_id=[2, 1])
    assert case.check(case.recipe_for_student())[0] == 0
    model = AutoModelForCausalLM.from_pretrained(case.student)
    write_folder(model, model.state_dict(), case.folder / "teacher", case.folder / "out")
    for name in ("config.json", "generation_config.json"):
        stated = json.loads((case.folder / "out" / name).read_text())
        assert (stated["eos_token_id"], stated["pad_token_id"]) == ([2, 1], 0)
    student = AutoModelForCausalLM.from_pretrained(case.folder / "out")
    for stop in (2, 1):
        said = student.generate(
            torch.tensor([[5, 6]]), max_new_tokens=8, prefix_allowed_tokens_fn=lambda _, ids, stop=stop: [stop]
        )
        assert said.tolist() == [[5, 6, stop]]
    assert load_tokenizer(case.folder / "out").eos_token == "<|im_end|>"


def test_26_a_temporary_folder_too_long_for_sockets_is_named(case: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = case.recipe("text")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(case.folder / ("x" * 60)))
    code, said = case.check(recipe)
    assert code == 2
    assert "TMPDIR=" in said
    assert "107" in said


def test_30_rows_beyond_the_tokenizer_are_never_kept(case: Models) -> None:
    folder = case.folder / "teacher"
    shutil.rmtree(folder)
    shutil.copytree(tiny_llama_folder(vocab=512, rows=576), folder)
    path = case.recipe_for_student()
    code, said = case.check(path)
    assert code == 0
    assert "vocabulary 576 (64 of them no token's: never kept)" in said
    recipe = load_recipe(path)
    tokens = np.array(load_tokenizer(folder)(prose(40))["input_ids"], np.int32)
    (rows,) = open_engine(recipe.teacher, recipe.capture, len(tokens)).score([tokens])
    assert isinstance(rows, TargetRows)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        log_p = model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0, :-1].double().log_softmax(-1)
    best = log_p.topk(recipe.capture.top_k).indices
    assert (best >= 512).any(dim=1).float().mean() > 0.9, "they must be among the likeliest, or nothing is shown"
    kept = log_p[:, :512].topk(recipe.capture.top_k)
    assert (rows.ids_NK == kept.indices.numpy()).all()
    outside = log_p.scatter(1, kept.indices, -torch.inf).logsumexp(1)
    assert rows.log_tail_N == pytest.approx(outside.numpy(), abs=1e-4)


@pytest.mark.parametrize("use", ["none", "plain", "template", "end"])
def test_a_special_token_without_a_row_is_of_no_harm_where_no_text_needs_it(case: Models, use: str) -> None:
    """Gemma 3's text models are shipped so: 262,144 rows, and <image_soft_token> has id 262,144."""
    tokenizer = AutoTokenizer.from_pretrained(case.folder / "teacher")
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=use != "plain")
    if use == "template":
        tokenizer.chat_template += "<image_soft_token>"
    if use == "end":
        tokenizer.eos_token = "<image_soft_token>"
    for folder in (case.folder / "teacher", case.student):
        tokenizer.save_pretrained(folder)
    code, said = case.check(case.recipe_for_student())
    if use == "none":
        assert code == 0
        assert "vocabulary 512, float32; no row for <image_soft_token>: a text with it is refused" in said
    else:
        assert code == 2
        assert "none for 1 id(s), the first in use 512 ('<image_soft_token>')" in said


def _pointer(folder: Path) -> str:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"
    (folder / "model.safetensors").write_text(text)
    return f"{folder}/model.safetensors is a Git LFS pointer of 134 bytes"


def _shard_missing(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    placed = {name: shards[i % 2] for i, name in enumerate(sorted(weights))}
    save_file({n: w for n, w in weights.items() if placed[n] == shards[0]}, folder / shards[0])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return f"{folder}/{shards[1]} is missing: model.safetensors.index.json places {len(weights) // 2} weight(s) in it"


def _prefixed(folder: Path) -> str:
    rename_weights(folder, lambda name: f"_orig_mod.{name}")
    return f"{folder} lacks 21 weight(s) of LlamaForCausalLM, the first lm_head.weight; it holds _orig_mod.model.embed"


def _one_more(folder: Path) -> str:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "v_head.weight": torch.zeros(3)}, path)
    return f"{folder} holds 1 weight(s) that LlamaForCausalLM does not have, the first v_head.weight"


def _other_shape(folder: Path) -> str:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.zeros(3)}, path)
    return "1 weight(s) have another shape than config.json states, the first model.norm.weight: [3] against [64]"


def _cut_short(folder: Path) -> str:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path} has {size - 100:,} bytes, and its header tells of {size:,}"


def _empty(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"")
    return f"{folder}/model.safetensors is empty"


def _page(folder: Path) -> str:
    (folder / "model.safetensors").write_text("<html>access is restricted</html>" * 9)
    return f"{folder}/model.safetensors (297 bytes) does not begin as a safetensors file does"


def _originals_alone(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    return f"model folder {folder} holds no weights (*.safetensors, *.bin)"


@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize(
    "break_it",
    [_pointer, _shard_missing, _prefixed, _one_more, _other_shape, _cut_short, _empty, _page, _originals_alone],
)
def test_27_broken_weights_are_named_by_check(case: Models, break_it: Callable[[Path], str], whose: str) -> None:
    said_of_it = break_it(case.folder / whose)
    code, said = case.check(case.recipe_for_student())
    assert code == 2
    assert said_of_it in said


def test_27_no_weight_is_made_up_where_check_was_left_out(case: Models) -> None:
    rename_weights(case.folder / "teacher", lambda name: name.replace("norm", "nrm"))
    with pytest.raises(UserError, match=r"the first model\.layers\.0\.input_layernorm\.weight; it holds model\.l"):
        from_teacher_layers(case.folder / "teacher", (0,), torch.float32)


def test_27_buffers_that_older_versions_saved_are_no_weights_of_another_model(case: Models) -> None:
    gpt2(case.student, 512)
    path = case.student / "model.safetensors"
    save_file({**load_file(path), "transformer.h.0.attn.masked_bias": torch.zeros(1)}, path)
    assert case.check(case.recipe_for_student())[0] == 0


def test_27_a_kind_that_transformers_cannot_build_is_found_by_check(case: Models) -> None:
    config = {"model_type": "mistral3", "text_config": json.loads((case.student / "config.json").read_text())}
    (case.student / "config.json").write_text(json.dumps(config))
    code, said = case.check(case.recipe_for_student())
    assert code == 2
    assert f"transformers cannot build a causal language model from {case.student}: ValueError: Unrecognized" in said


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_kept(case: Models) -> None:
    teacher, out = case.folder / "teacher", case.folder / "out"
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    exported(teacher, out)
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], weights["lm_head.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


def test_28_learned_positions_fewer_than_the_window_are_refused(case: Models) -> None:
    gpt2(case.student, 64)
    code, said = case.check(case.recipe_for_student(window=128))
    assert code == 2
    assert "corpus.window_tokens=128 is more than the 64 positions of the student" in said


def test_28_rotary_positions_fewer_than_the_window_are_a_warning(case: Models) -> None:
    change(case.student / "config.json", max_position_embeddings=64)
    code, said = case.check(case.recipe_for_student(window=128))
    assert code == 0
    assert "warning: corpus.window_tokens=128 is more than the 64 positions of the student" in said


def test_29_beside_tokenizer_json_a_tekken_json_is_not_read(case: Models) -> None:
    plain, shown = load_tokenizer(case.student)("one river").input_ids, {path.name for path in case.student.iterdir()}
    for folder in (case.folder / "teacher", case.student):
        change(folder / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
        (folder / "tekken.json").write_text("{}")
        (folder / "consolidated.safetensors").write_text("the publisher's own")
    assert case.check(case.recipe_for_student())[0] == 0
    seen = stage_folder(str(case.student))
    assert load_tokenizer(seen)("one river").input_ids == plain
    assert {path.name for path in seen.iterdir()} == shown


def test_36_a_spike_of_a_loss_that_falls_below_zero_is_no_bound(case: Models) -> None:
    path = Path(case.recipe("text"))
    path.write_text(path.read_text().replace("[train]", '[loss]\nobjective = "truncated"\n[train]\nloss_spike = 3.0'))
    with pytest.raises(UserError, match=r'train\.loss_spike=3\.0 is a multiple .*="truncated" falls below 0'):
        load_recipe(path)


def test_every_chat_template_reaches_the_export(case: Models) -> None:
    teacher = case.folder / "teacher"
    (teacher / "additional_chat_templates").mkdir()
    (teacher / "additional_chat_templates/rag.jinja").write_text("{{ messages[0].content }} with documents")
    exported(teacher, case.folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(case.folder / "out")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], chat_template="rag", tokenize=False)
    assert said == "q with documents"
