"""The student without Ray: where it comes from, its loss inside the module, adapters, schedule, normalisation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill_ray.config.loss import LossSection
from distill_ray.config.student import LoraSection, TrainSection
from distill_ray.errors import UserError
from distill_ray.losses import LossSpec, project
from distill_ray.student.build import build_initial, cut_config, from_teacher_layers
from distill_ray.student.engine import StudentEngine, check_resumable
from distill_ray.student.folder import write_folder
from distill_ray.student.frozen import freeze
from distill_ray.student.lora import add_lora, merge_lora
from distill_ray.student.module import DistillModule, loss_spec
from distill_ray.student.schedule import learning_rate
from tests.assets import tiny_llama_folder, tiny_teacher_folder
from tests.stages.train_assets import tiny_recipe
from tests.unit.student_fakes import VOCAB, documents, pack, steps_of, tiny_config, tiny_model

SPEC = LossSpec(VOCAB, 1.0, 0.2)


def test_frozen_weights_are_named_as_they_are_and_leave_some_to_train():
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    freeze(model, ("lm_head.weight", "model.layers.0.*"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("model.layers.1.") or n == "model.norm.weight"
    }
    with pytest.raises(
        UserError, match=r"no weight of LlamaForCausalLM is named 'layers\.0\.\*'; among its names are "
    ):
        freeze(model, ("layers.0.*",))
    with pytest.raises(UserError, match=r"student\.freeze=\['model\.\*'\] leaves no weight to train"):
        freeze(model, ("model.*",))


def test_chosen_layers_of_the_teacher_are_copied_with_their_indices():
    folder = tiny_llama_folder(vocab=512, layers=4)
    whole = from_teacher_layers(folder, (0, 1, 2, 3), torch.float32)
    cut = from_teacher_layers(folder, (0, 3), torch.float32)
    assert cut.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1]
    source, got = whole.state_dict(), cut.state_dict()
    for name, weight in got.items():
        assert torch.equal(weight, source[name.replace("layers.1.", "layers.3.")]), name
    assert cut.lm_head.weight is cut.model.embed_tokens.weight


def test_settings_of_each_layer_are_cut_with_the_layers():
    config = tiny_config("Gemma2Config", num_hidden_layers=4)
    kinds = list(config.layer_types)
    assert cut_config(config, (1, 2, 3)).layer_types == kinds[1:]


def test_layers_out_of_range_are_refused_with_the_range():
    with pytest.raises(UserError, match=r"layers 0 … 1"):
        from_teacher_layers(tiny_teacher_folder(), (0, 2), torch.float32)


def test_random_student_is_drawn_from_the_seed_and_needs_enough_rows(tmp_path: Path):
    config = json.loads((tiny_teacher_folder() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = []
    for seed in (1, 1, 2):
        recipe = tiny_recipe(tmp_path, student={"config": str(tmp_path)}, train={"seed": seed})
        model, text = build_initial(recipe, tiny_teacher_folder())
        assert text.num_hidden_layers == 1
        weights.append(model.model.embed_tokens.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    with pytest.raises(UserError, match=r"the student's embedding 500 rows: there is none for 12 id"):
        build_initial(tiny_recipe(tmp_path, student={"config": str(tmp_path)}), tiny_teacher_folder())


HEADS = [
    ("LlamaConfig", {"tie_word_embeddings": True}),
    ("LlamaConfig", {"tie_word_embeddings": False}),
    ("Gemma2Config", {"final_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    ("GraniteConfig", {"logits_scaling": 4.0}),
    ("CohereConfig", {"logit_scale": 0.25}),
    ("MistralConfig", {"sliding_window": 4}),
]


@pytest.mark.parametrize(("kind", "extra"), HEADS)
def test_packed_hidden_states_and_head_give_each_documents_own_logits(kind: str, extra: dict[str, object]):
    model = tiny_model(tiny_config(kind, **extra))
    spec = loss_spec(model.config, VOCAB, LossSection())
    module = DistillModule(model, spec)
    rng = np.random.default_rng(0)
    docs = documents(rng, 3)
    batch = pack(rng, docs, 30, 1.0)
    head = {"vocab_size": VOCAB, "logit_scale": spec.logit_scale, "softcap": spec.softcap}
    with torch.no_grad():
        got = project(module.hidden_rows(batch), module.head.weight, module.head.bias, **head)
        expected = torch.cat([model(torch.from_numpy(d)[None]).logits[0, :-1, :VOCAB] for d in docs])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_scheduled_loss_is_that_of_the_batchs_step():
    section = LossSection(hard_label_weight=0.0, hard_label_points=((1.0, 1.0),))
    model = tiny_model(tiny_config())

    def at(step: int) -> LossSpec:
        return loss_spec(model.config, VOCAB, section, step=step, steps=4)

    module = DistillModule(model, at(0), at)
    rng = np.random.default_rng(0)
    batch = pack(rng, documents(rng, 3), 30, 1.0)
    for step in range(4):
        objective, kl, _, ce = module(replace(batch, step=step)).tolist()[:4]
        assert objective == pytest.approx((1 - step / 4) * kl + step / 4 * ce, rel=1e-6)
        assert kl != pytest.approx(ce, rel=0.01)


def test_a_head_that_does_something_unknown_is_refused():
    model = tiny_model(tiny_config("GraniteConfig", logits_scaling=4.0))
    with pytest.raises(UserError, match="does not know"):
        DistillModule(model, SPEC)


LEAKING = [
    ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    (
        "FalconH1Config",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "extra"), LEAKING)
def test_a_model_whose_state_crosses_documents_is_refused(kind: str, extra: dict[str, object], dtype: torch.dtype):
    model = tiny_model(tiny_config(kind, **extra)).to(dtype)
    with pytest.raises(UserError, match=r"packed behind another document.*choose a student with attention"):
        DistillModule(model, loss_spec(model.config, VOCAB, LossSection()))


@pytest.mark.parametrize("kind", ["LlamaConfig", "MixtralConfig"])
def test_attention_alone_is_not_taken_for_a_leak_in_bfloat16(kind: str):
    model = tiny_model(tiny_config(kind)).to(torch.bfloat16)
    assert DistillModule(model, SPEC)


DROPOUTS = [
    ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "attn_pdrop=0.1, embd_pdrop=0.1"),
    ("LlamaConfig", {"attention_dropout": 0.25}, "attention_dropout=0.25"),
    ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5}, "dropout=0.1, layerdrop=0.5"),
]


@pytest.mark.parametrize(("kind", "extra", "said"), DROPOUTS)
def test_a_configuration_with_dropout_trains_without_it(tmp_path: Path, kind: str, extra: dict[str, object], said: str):
    tiny_config(kind, **extra, vocab_size=512).save_pretrained(tmp_path)
    recipe = tiny_recipe(tmp_path, student={"config": str(tmp_path)})
    notes: list[str] = []
    model, config = build_initial(recipe, tiny_teacher_folder(), notes.append)
    module = DistillModule(model, loss_spec(config, 512, LossSection())).train()
    rng = np.random.default_rng(0)
    batch = pack(rng, documents(rng, 3), 30, 1.0)
    assert float(module(batch)[0].detach()) == float(module(batch)[0].detach())
    assert len(notes) == 1
    assert said in notes[0]


def test_adapters_merge_to_what_peft_computes():
    model = tiny_model(tiny_config())
    section = LoraSection(rank=2, alpha=3.0, targets=("q_proj", "down_proj"))
    add_lora(model, section, seed=0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in n for n in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        adapted = model(ids).logits
        plain = tiny_model(tiny_config(), seed=1)
        plain.load_state_dict(merge_lora(model.state_dict(), section))
        torch.testing.assert_close(plain(ids).logits, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [("q_prj",), ("lm_head",)])
def test_adapters_on_unknown_modules_or_the_head_are_refused(targets: tuple[str, ...]):
    with pytest.raises(UserError, match=r"student\.lora\.targets"):
        add_lora(tiny_model(tiny_config()), LoraSection(targets=targets), seed=0)


@pytest.mark.parametrize("tie", [True, False])
def test_the_written_folder_loads_and_brings_the_teachers_tokenizer(tmp_path: Path, tie: bool):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(tiny_config(tie_word_embeddings=tie))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    write_folder(model, state, tiny_teacher_folder(), tmp_path / "out")
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) != tie
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 512
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        env = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        for name, value in {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def test_accumulated_loss_is_normalised_by_the_whole_batch(one_process_group: None):
    """Very unequal micro-batches: dividing each by its own count would give another curve.

    Norms do not decay, gradients are not clipped, and frozen weights keep every bit.
    """
    section = TrainSection(
        precision="fp32",
        use_gpu=False,
        zero_stage=2,
        learning_rate=1e-2,
        clip_norm=0,
        warmup_fraction=0.0,
        weight_decay=0.5,
    )
    fixed = ("model.layers.0.*",)

    def module() -> DistillModule:
        model = tiny_model(config)
        freeze(model, fixed)
        return DistillModule(model, SPEC)

    config = tiny_config(tie_word_embeddings=True)
    batches = steps_of(np.random.default_rng(1), 3, 3)
    engine = StudentEngine.start(module(), section, micro_steps=3)
    from deepspeed.comm import comm

    assert comm.cdb.shm_comm_op is None, "nothing is compiled on CPUs"
    source = iter(batches)
    results = [engine.train_step(source, 3) for _ in range(3)]

    plain = module().train()
    norms = [p for n, p in plain.named_parameters() if "norm" in n]
    others = [p for n, p in plain.named_parameters() if "norm" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.5}], lr=1.0, betas=section.betas
    )
    for step, result in enumerate(results):
        micro = [b for b in batches if b.step == step]
        loss = torch.stack([plain(b)[0] for b in micro]).sum() / sum(len(b.rows) for b in micro)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 3, section)
        optimizer.step()
        assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert result.tokens == sum(len(b.rows) for b in micro)
    state = engine.export_state()
    assert state is not None
    trained, before = dict(plain.named_parameters()), tiny_model(config).state_dict()
    for name, weight in state.items():
        if name.startswith("model.layers.0."):
            assert torch.equal(weight, before[name])
        elif name != "lm_head.weight":
            expected = trained[name.replace("model.", "body.", 1)].detach()
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(weight, before[name])


def test_another_stage_is_refused_with_the_remedy():
    section = TrainSection(zero_stage=2)
    check_resumable(2, section, 10)
    with pytest.raises(UserError, match=r"saved at ZeRO stage 3.*zero_stage = 3"):
        check_resumable(3, section, 10)


def test_each_rank_needs_its_own_shards_and_the_common_files():
    names = [
        "mp_rank_00_model_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_11_mp_rank_00_optim_states.pt",
    ]
    assert StudentEngine.needed(names, 1) == names[:2]
