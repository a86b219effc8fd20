"""Models, tokenizers and text for tests, made once under `.test-assets/` from installed packages alone."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CACHE = REPO / ".test-assets"
SMOLLM2_VOCAB = 49_152
TINY_VOCAB = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

sys.path.insert(0, str(REPO / "jobs"))
from quickstart_assets import make_corpus, make_model, prose_topics  # noqa: E402


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain Hugging Face folder, bf16; converted on the first call."""
    return make_model(CACHE)


def corpus_folder() -> Path:
    """Folder of `part-0.jsonl` and `part-1.jsonl` with records {"text", "topic"}."""
    return make_corpus(CACHE)


def _make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Run `make` on a temporary folder and rename it to `target`, unless that is there; safe between processes."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
            make(temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
    return target


def tiny_tokenizer_folder(vocab: int = TINY_VOCAB) -> Path:
    """A byte-level BPE of `vocab` entries trained on the pydoc text, with a ChatML template; eos is `<|im_end|>`."""

    def make(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(prose_topics().values(), trainer)
        if backend.get_vocab_size() != vocab:
            raise ValueError(f"the text gives {backend.get_vocab_size()} entries, not {vocab}; ask for fewer")
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(folder)

    return _make_once(CACHE / f"tokenizer-bpe{vocab}", make)


def tiny_llama_folder(
    cache: Path = CACHE,
    *,
    vocab: int = SMOLLM2_VOCAB,
    rows: int | None = None,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    tie: bool = True,
    seed: int = 0,
) -> Path:
    """A random Llama (float32 weights) as a Hugging Face folder; the same arguments give the same bytes.

    Args:
        cache: folder under which it is made.
        vocab: size of the tokenizer: SmolLM2's at 49,152, else a byte-level BPE of that many entries.
        rows: rows of the embedding matrix where it is padded beyond `vocab`.
        hidden: model width D; the feed-forward width is 2 D.
        layers: decoder layers.
        heads: attention heads; divides `hidden`.
        tie: share the embedding with the head.
        seed: of the weights.
    """
    rows = rows or vocab
    name = f"llama-v{vocab}-r{rows}-d{hidden}-l{layers}-h{heads}-{'tied' if tie else 'untied'}-s{seed}"

    def make(folder: Path) -> None:
        import torch
        from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

        source = smollm2_folder() if vocab == SMOLLM2_VOCAB else tiny_tokenizer_folder(vocab)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(source / file, folder / file)
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=tie,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            # The default std of 0.02 gives an almost uniform distribution, on which every KL is 0 and any bug passes.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.normal_(std=0.2)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model.save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o644)

    return _make_once(cache / name, make)


def tiny_teacher_folder() -> Path:
    """512-entry byte-level BPE and a 2-layer Llama of width 64 with 4 heads: trains in seconds."""
    return tiny_llama_folder(vocab=TINY_VOCAB)


def open_with_bos(folder: Path) -> int:
    """Let the tiny tokenizer of a folder put <|endoftext|> before every text; its id."""
    bos, name = 0, "<|endoftext|>"
    special, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    post = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": post}))
    return bos
