"""FLOPs by the formula against those counted, devices' peaks, and the figures of a step's line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill_ray.config.student import LoraSection, TrainSection
from distill_ray.ingest.plan import BatchPlan, _Sequences
from distill_ray.lease import Lease
from distill_ray.losses import LossSpec
from distill_ray.storage import open_storage
from distill_ray.student.flops import BF16_TFLOPS, ModelFlops, peak_flops
from distill_ray.student.lora import add_lora
from distill_ray.student.module import DistillModule
from distill_ray.train.result import store_history, to_lines
from distill_ray.train.speed import Speed
from distill_ray.train.tensorboard import EventFile
from tests.unit.student_fakes import VOCAB, pack, tiny_config, tiny_model

CPU = torch.device("cpu")


def tiny(**extra: Any) -> Any:
    """Two layers with attention as plain matrix products, which can be counted."""
    config: Any = tiny_config(**{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 256, **extra})
    model: Any = tiny_model(config)
    model.set_attn_implementation("eager")
    return model


def student(model: Any) -> DistillModule:
    return DistillModule(model, LossSpec(VOCAB, 1.0, 0.0))


def counted(module: DistillModule, lengths: list[int]) -> int:
    """FLOPs of the body's forward and backward, each document alone."""
    rng = np.random.default_rng(0)
    with FlopCounterMode(display=False) as counter:
        for n in lengths:
            batch = pack(rng, [rng.integers(3, VOCAB, n)], n, share=1.0)
            module.hidden_rows(batch).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_counts_what_is_multiplied(tied: bool):
    module = student(tiny(tie_word_embeddings=tied))
    lengths = [192, 16, 64]
    flops = counted(module, lengths)
    model = ModelFlops.of(module)
    assert model is not None
    # Weights of norms are N's too, and are not multiplied by matrices.
    assert flops == pytest.approx(model.of_step(np.array(lengths), 0), rel=0.004)
    # Documents of a pack are no context to each other.
    assert model.of_step(np.array([sum(lengths)]), 0) > 1.1 * flops


def test_the_head_costs_at_supervised_rows_only():
    model = ModelFlops.of(student(tiny()))
    assert model is not None
    lengths = np.array([10, 20])
    assert model.of_step(lengths, 7) - model.of_step(lengths, 0) == 7 * 6 * VOCAB * 64


def test_frozen_weights_have_no_gradient_of_their_own():
    model = tiny()
    module = student(model)
    whole = ModelFlops.of(module)
    add_lora(model, LoraSection(rank=2, targets=("q_proj",)), seed=0)
    adapted = ModelFlops.of(module)
    assert whole is not None
    assert adapted is not None
    adapters = 6 * 2 * 2 * (64 + 32)  # two layers, rank 2, 64 → 32
    assert adapted.weights == pytest.approx(whole.weights * 4 / 6 + adapters)
    assert adapted.head == whole.head * 4 / 6


def test_a_sliding_window_bounds_the_context():
    config: Any = tiny_config("Gemma2Config", num_hidden_layers=4, sliding_window=8)
    module = DistillModule(tiny_model(config), LossSpec(VOCAB, 1.0, 0.0, softcap=config.final_logit_softcapping))
    model = ModelFlops.of(module)
    assert model is not None
    each = 12.0 * 4 * 8 * 2
    assert model.attention == ((8, each), (None, each))
    assert model.of_step(np.array([20]), 0) == 20 * (model.weights + each * (8 + 20))


def test_a_mixture_of_experts_has_no_formula():
    body = torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})
    assert ModelFlops.of(SimpleNamespace(body=body)) is None  # type: ignore[arg-type]


def test_a_peak_is_known_or_stated_and_never_guessed():
    train = TrainSection()
    assert peak_flops(train, "NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops(train, "NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops(train, "NVIDIA H1000") is None
    assert peak_flops(train, None) is None
    assert peak_flops(TrainSection(precision="fp32"), "NVIDIA H100 80GB HBM3") is None
    assert peak_flops(TrainSection(precision="fp32", peak_tflops=60.0), None) == 60e12
    assert all(50 < tflops < 3000 for tflops in BF16_TFLOPS.values())


def plan() -> BatchPlan:
    """Two batches of two packs: documents of 5 + 3 and 8 tokens, then of 4."""
    columns = ([0] * 4, [0, 1, 2, 3], [5, 3, 8, 4], [4, 2, 7, 3], [0] * 4)
    s = _Sequences(*(np.array(c, np.int64) for c in columns))
    return BatchPlan("c", (), 8, 2, s, np.arange(4), np.array([0, 2, 3, 4]))


def test_a_steps_line_tells_of_speed_and_memory():
    said: list[str] = []
    flops = ModelFlops(10.0, ((None, 1.0),), 100.0)
    speed = Speed(plan(), flops, TrainSection(precision="fp32", peak_tflops=1e-9), 2, CPU, said.append)
    line = speed.of(0, 0.5)
    assert (line["workers"], line["input_tokens"], line["tokens_per_s"]) == (2, 16, 32.0)
    done = 16 * 10 + 5**2 + 3**2 + 8**2 + 13 * 100
    assert line["mfu"] == pytest.approx(done / (0.5 * 2 * 1000))
    assert 50 * 2**20 < line["host_peak_bytes"] < 2**40
    assert line["time"] > 1.7e9
    assert "cuda_peak_bytes" not in line
    assert speed.of(1, 0.5)["input_tokens"] == 4
    assert not said


def test_on_a_cpu_or_without_a_formula_there_is_no_mfu():
    said: list[str] = []
    assert "mfu" not in Speed(plan(), ModelFlops(1.0, (), 1.0), TrainSection(), 2, CPU, said.append).of(0, 0.5)
    assert not said
    assert "mfu" not in Speed(plan(), None, TrainSection(peak_tflops=1.0), 2, CPU, said.append).of(0, 0.5)
    assert said == ["no MFU is reported: the student is a mixture of experts"]


def read_events(data: bytes) -> list[Any]:
    """Events of a file whose checksums hold."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto import event_pb2

    def masked(part: bytes) -> int:
        crc = crc32c(part)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    events, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 8)[0] == masked(data[at : at + 8])
        assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked(body)
        events.append(event_pb2.Event.FromString(body))
        at += 16 + length
    return events


def lines(first: int, stop: int) -> list[dict[str, float]]:
    return [{"step": s, "time": 1.8e9 + s, "loss": 4.0 - s / 10, "lr": 1e-4, "mfu": 0.25} for s in range(first, stop)]


def test_event_files_are_a_pure_function_of_the_lines():
    file = EventFile()
    early, late = file.of(lines(0, 3)), file.of(lines(0, 8))
    assert late.startswith(early)
    assert late == EventFile().of(lines(0, 8))
    first, *events = read_events(late)
    assert first.file_version == "brain.Event:2"
    assert [event.step for event in events] == list(range(8))
    assert [event.wall_time for event in events] == [1.8e9 + s for s in range(8)]
    assert {v.tag: v.simple_value for v in events[2].summary.value} == pytest.approx(
        {"loss/loss": 3.8, "optimizer/lr": 1e-4, "speed/mfu": 0.25}
    )


def test_a_resumed_run_has_no_step_twice(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    with Lease.acquire(storage, "runs/tiny/w1") as lease:
        EventFile().store(storage, lease.token, lines(0, 7))
    with Lease.acquire(storage, "runs/tiny/w1") as lease:  # back to the checkpoint of step 4, then on
        history = [json.loads(line) for line in to_lines(lines(0, 4)).splitlines()]
        file = EventFile()
        file.of(history)
        history += [line | {"time": 1.9e9} for line in lines(4, 9)]
        file.store(storage, lease.token, history)
        store_history(storage, lease.token, history)
    (stored,) = storage.list("runs/tiny/w1/tensorboard/")
    events = read_events(storage.get(stored.key))[1:]
    assert [event.step for event in events] == list(range(9))
    assert "tfevents" in stored.key
