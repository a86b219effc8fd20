"""Which files of a Hugging Face folder make its model: what else is shipped beside them is never loaded or hashed."""

from __future__ import annotations

from collections.abc import Iterable

WEIGHT_FILES = "*.safetensors, *.bin"
"""Names of the files that hold weights, for messages."""
MOST_HEADER = 100 * 2**20
"""Bytes that the safetensors format allows its header."""
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".mlmodel", ".engine"),
)
_OF_TRAINING = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_COPIES = ("original", "onnx", "openvino", "coreml", "metal", "gguf")
"""Folders that publishers put the same model in for other programs."""
_TEXT = (".py", ".json", ".jinja", ".txt", ".model")


def weight_files(names: Iterable[str]) -> list[str]:
    """The weights that transformers and vLLM load, sorted: `model*.safetensors`, else PyTorch's own, else other
    safetensors; never the publisher's originals (`consolidated*`, `*.pth`) or anything in a folder below.

    Args:
        names: of all files, relative to the model folder.
    """
    top = sorted(n for n in names if "/" not in n and not n.startswith("consolidated"))
    safetensors = [n for n in top if n.endswith(".safetensors")]
    return (
        [n for n in safetensors if n.startswith("model")]  # beside an adapter's or a value head's
        or [n for n in top if n.endswith(".bin") and n not in _OF_TRAINING]
        or safetensors
    )


def model_files(names: Iterable[str]) -> set[str]:
    """The files that a model is loaded from: `weight_files`, configuration, tokenizer, templates, code."""
    names = set(names)
    weights = set(weight_files(names))
    return weights | {name for name in names if _is_read(name, names)}


def _is_read(name: str, names: set[str]) -> bool:
    folder, _, last = name.rpartition("/")
    if folder:
        return last.endswith(_TEXT) and folder.partition("/")[0] not in _COPIES
    if last == "tekken.json":
        # Beside it transformers takes Mistral's own tokenizer, which has no offsets and no template.
        return "tokenizer.json" not in names
    return not last.endswith(_WEIGHTS) and not last.startswith("consolidated")
