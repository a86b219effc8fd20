"""Capture inside a worker without vLLM: prompt rows of a step for both model runners, the store, the guard.

The runners here hold the very attributes that the hooks read, filled as vLLM 0.32 fills them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.errors import CannotCaptureError, DistillError, IntegrityError
from distill_ray.teacher.head import UnknownEngineError
from distill_ray.teacher.hook import CaptureWorker, install
from distill_ray.teacher.seeds import row_keys
from distill_ray.teacher.spans import Span, keys_of, rows_of
from distill_ray.teacher.store import RowStore

PROMPTS = {"a": [5, 6, 7, 8, 9], "b": [1, 2], "c": [3, 4, 5, 6]}


class RunnerV1:
    """The part of vLLM's V1 `GPUModelRunner` that has to do with prompt log-probabilities."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.max_num_tokens, self.max_model_len = 8192, 1024
        self.model_config: Any
        self.num_prompt_logprobs = dict.fromkeys(PROMPTS, 0)
        self.requests = {r: SimpleNamespace(num_computed_tokens=0, prompt_token_ids=p) for r, p in PROMPTS.items()}
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, np.int32))
        table = np.zeros((8, 16), np.int32)
        for i, prompt in enumerate(PROMPTS.values()):
            table[i, : len(prompt)] = prompt
        self.input_batch = SimpleNamespace(req_id_to_index={r: i for i, r in enumerate(PROMPTS)}, token_ids_cpu=table)

    def _get_prompt_logprobs_dict(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict:
        raise AssertionError("replaced by the hook")

    def step(self, scheduled: dict[str, int]) -> dict:
        """One step: rows of the hidden states are laid out in the order of the batch."""
        counts = [scheduled.get(r, 0) for r in PROMPTS]
        self.query_start_loc.np[1 : 1 + len(counts)] = np.cumsum(counts)
        hidden = torch.arange(sum(counts), dtype=torch.float32)[:, None]
        out = self._get_prompt_logprobs_dict(hidden, scheduled)
        for r, n in scheduled.items():
            self.requests[r].num_computed_tokens += n
        return out


@dataclass
class Taken:
    spans: list[list[Span]] = field(default_factory=list)
    actual: list[list[int]] = field(default_factory=list)

    def __call__(self, spans: list[Span], hidden: torch.Tensor, actual: torch.Tensor) -> None:
        assert len(actual) == sum(s.count for s in spans)
        assert rows_of(spans).max() < len(hidden)
        self.spans.append(spans)
        self.actual.append(actual.tolist())


def test_v1_rows_under_chunked_prefill() -> None:
    runner, taken = RunnerV1(), Taken()
    install(runner, taken)
    assert runner.step({"a": 3, "b": 2}) == {}
    assert taken.spans[-1] == [Span("a", 0, 0, 3, 4), Span("b", 3, 0, 1, 1)]
    assert taken.actual[-1] == [6, 7, 8, 2]
    assert list(runner.num_prompt_logprobs) == ["a", "c"]
    runner.step({"a": 1, "c": 4})  # "a" has had its last row, but its last token is still to come
    assert taken.spans[-1] == [Span("a", 0, 3, 1, 4), Span("c", 1, 0, 3, 3)]
    assert taken.actual[-1] == [9, 4, 5, 6]
    assert list(runner.num_prompt_logprobs) == ["a"]
    runner.step({"a": 1})  # no row left: the hook ends the request and takes nothing
    assert len(taken.spans) == 2
    assert not runner.num_prompt_logprobs


def test_v1_rows_after_preemption_come_again() -> None:
    runner, taken = RunnerV1(), Taken()
    install(runner, taken)
    runner.step({"a": 3})
    runner.requests["a"].num_computed_tokens = 0  # preempted: all its blocks are gone
    runner.step({"b": 2})
    runner.step({"a": 5})
    assert [(s.start, s.count) for spans in taken.spans for s in spans if s.request == "a"] == [(0, 3), (0, 4)]


def test_the_hook_steps_aside_for_vllms_own_method_and_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, taken = RunnerV1(), Taken()
    runner._get_prompt_logprobs_dict = lambda hidden_states, num_scheduled_tokens: {"a": "vLLM's own"}  # type: ignore[method-assign]
    worker = _worker(monkeypatch, runner)
    worker._capture_hook = install(runner, taken)
    runner.model_config = SimpleNamespace(get_vocab_size=lambda: 131_072)
    assert runner.step({"a": 3}) == {}
    assert worker.capture_aside(True) == ["", ""]
    assert runner.step({"a": 1}) == {"a": "vLLM's own"}
    assert worker.capture_aside(False) == ["", ""]
    assert runner.step({"b": 2}) == {}
    assert [spans[0].request for spans in taken.spans] == ["a", "b"]


def test_the_hook_stays_where_vllms_own_method_knows_no_bound_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = RunnerV1()
    worker = _worker(monkeypatch, runner)
    worker._capture_hook = hook = install(runner, Taken())
    runner.model_config, runner.max_model_len = SimpleNamespace(get_vocab_size=lambda: 131_072), 1025
    failure, reason = worker.capture_aside(True)
    assert (failure, reason) == (
        "",
        "537,395,200 bytes of logits at once in vLLM's V1 model runner, 536,870,912 may be",
    )
    assert runner._get_prompt_logprobs_dict is hook.capture
    logprobs = PromptLogprobsWorkerV2(8)  # the V2 runner shows the head 1,024 rows at a time
    v2: Any = SimpleNamespace(prompt_logprobs_worker=logprobs)
    worker = _worker(monkeypatch, v2)
    worker._capture_hook = install(v2, Taken())
    assert worker.capture_aside(True) == ["", ""]
    assert logprobs.compute_prompt_logprobs is worker._capture_hook.vllms
    worker._capture_hook = None  # a pipeline stage that is not the last
    assert worker.capture_aside(True) == ["", ""]


class PromptLogprobsWorkerV2:
    def __init__(self, slots: int) -> None:
        self.uses_prompt_logprobs = np.zeros(slots, bool)

    def compute_prompt_logprobs(
        self, logits_fn: Any, hidden_states: Any, input_batch: Any, all_token_ids: Any, num_computed_tokens: Any,
        prompt_lens: Any,
    ) -> dict:  # fmt: skip
        raise AssertionError("replaced by the hook")


def test_v2_rows() -> None:
    worker, taken = PromptLogprobsWorkerV2(8), Taken()
    install(SimpleNamespace(prompt_logprobs_worker=worker), taken)
    worker.uses_prompt_logprobs[[4, 2, 6]] = True
    table, lengths = torch.zeros(8, 16, dtype=torch.int32), np.zeros(8, np.int32)
    for slot, prompt in zip((4, 2, 6), PROMPTS.values(), strict=True):
        table[slot, : len(prompt)] = torch.tensor(prompt)
        lengths[slot] = len(prompt)
    lengths[0] = 3
    batch = SimpleNamespace(
        req_ids=["a", "decoding", "b", "c"],
        idx_mapping_np=np.array([4, 0, 2, 6]),
        num_computed_prefill_tokens_np=np.array([2, 3, 0, 0]),
        num_scheduled_tokens=np.array([3, 1, 2, 2]),
        prefill_len_np=np.array([5, 3, 2, 6]),  # "c" was preempted while it decoded: 2 generated tokens are prefill
        query_start_loc_np=np.array([0, 3, 4, 6, 8]),
    )
    out = worker.compute_prompt_logprobs(None, torch.zeros(8, 1), batch, table, None, lengths)
    assert out == {}
    assert taken.spans == [[Span("a", 0, 2, 2, 4), Span("b", 4, 0, 1, 1)]]
    assert taken.actual == [[8, 9, 2]]


def test_rows_computed_again_have_the_same_seeds() -> None:
    """A preempted prompt comes again in other chunks, and in another engine under another name."""
    a, b = 0x00C0FFEE00C0FFEE, 0xFFFFFFFFFFFFFFFF
    once = keys_of([Span(f"s0-{a:016x}-1f2e3d4c", 0, 0, 9, 9), Span(f"s1-{b:016x}-99999999", 9, 2, 3, 9)])
    again = [Span(f"s7-{a:016x}-aaaaaaaa", 0, 0, 4, 9), Span(f"s7-{a:016x}-aaaaaaaa", 4, 4, 5, 9)]
    np.testing.assert_array_equal(keys_of(again), once[:9])
    np.testing.assert_array_equal(once[9:], row_keys(b, 0, 9)[2:5])
    assert len(set(once.tolist())) == 12
    with pytest.raises(IntegrityError, match="calls a request 'cmpl-3'"):
        keys_of([Span("cmpl-3", 0, 0, 4, 4)])


def test_an_unknown_runner_is_refused() -> None:
    with pytest.raises(UnknownEngineError, match="has no _get_prompt_logprobs_dict"):
        install(SimpleNamespace(), Taken())
    runner = RunnerV1()
    runner._get_prompt_logprobs_dict = lambda hidden_states, scheduler_output: {}  # type: ignore[method-assign]
    with pytest.raises(UnknownEngineError, match="takes"):
        install(runner, Taken())
    del runner._get_prompt_logprobs_dict, runner.num_prompt_logprobs
    with pytest.raises(UnknownEngineError, match="has no num_prompt_logprobs"):
        install(runner, Taken())
    worker = PromptLogprobsWorkerV2(1)
    del worker.uses_prompt_logprobs
    with pytest.raises(UnknownEngineError, match="uses_prompt_logprobs"):
        install(SimpleNamespace(prompt_logprobs_worker=worker), Taken())


def test_store_places_rows_by_position_and_never_twice() -> None:
    store = RowStore()
    words = torch.arange(18, dtype=torch.int32).view(6, 3)
    store.add([Span("a", 0, 0, 2, 4), Span("b", 2, 0, 1, 1)], words[:3])
    store.add([Span("a", 0, 0, 3, 4)], words[3:] * 0)  # recomputed after preemption
    with pytest.raises(KeyError, match="1 of 4 rows"):
        store.pop(["a"])
    assert store.recomputed == 1
    store.add([Span("c", 0, 1, 3, 4)], words[3:])
    store.add([Span("c", 0, 0, 1, 4)], words[:1])
    got = np.frombuffer(store.pop(["c", "b"]), np.int32).reshape(-1, 3)
    np.testing.assert_array_equal(got, words[[0, 3, 4, 5, 2]].numpy())
    assert len(store) == 0


def _worker(monkeypatch: pytest.MonkeyPatch, model_runner: Any) -> CaptureWorker:
    """A vLLM worker with this runner, alone in its groups."""
    from vllm.distributed import parallel_state

    group = SimpleNamespace(is_last_rank=True, is_first_rank=True, world_size=1)
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: group)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    worker = CaptureWorker()
    worker.model_runner = model_runner  # type: ignore[attr-defined]
    return worker


def test_a_name_that_the_engine_lacks_is_a_reason_and_a_mistake_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch):
    class Runner:
        pass

    Runner.__module__ = "vllm.v1.worker.gpu_model_runner"
    found = _worker(monkeypatch, Runner()).capture_install(4, [], 16, 16)
    assert found == ["", "AttributeError: 'Runner' object has no attribute 'model_config'"]
    failure, reason = _worker(monkeypatch, RunnerV1()).capture_install(4, [], 16, 16)
    assert failure.endswith("AttributeError: 'RunnerV1' object has no attribute 'model_config'\n")
    assert reason is None


def test_what_the_hook_raises_in_a_step_comes_with_the_rows_unless_other_ranks_wait() -> None:
    def take(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    runner, store, worker = RunnerV1(), RowStore(), CaptureWorker()
    install(runner, take, store.fail)
    assert runner.step({"a": 3, "b": 2}) == {}
    worker._capture_store = store
    failure, rows = worker.capture_fetch(["b"])
    assert failure.strip().endswith("OutOfMemoryError: tried to allocate 2 GiB")
    assert rows is None
    runner = RunnerV1()
    install(runner, take)
    with pytest.raises(torch.OutOfMemoryError):
        runner.step({"a": 3})


def test_an_engine_that_fails_while_rows_are_fetched_ends_the_process_as_one_that_fails_in_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from distill_ray.teacher.vllm_engine import VllmEngine

    class _EndedError(Exception):
        pass

    def end(code: int) -> None:
        raise _EndedError(code)

    def fails(*_: Any, **__: Any) -> list[Any]:
        raise RuntimeError("cancelled")

    monkeypatch.setattr("os._exit", end)
    engine = object.__new__(VllmEngine)
    engine._engine = SimpleNamespace(collective_rpc=fails, step=fails)
    for call in (lambda: engine._fetch([], []), lambda: engine._or_die(engine._engine.step)):
        with pytest.raises(_EndedError, match="1"):
            call()
        assert "RuntimeError: cancelled" in capsys.readouterr().err


def test_what_a_worker_could_not_do_ends_the_run_and_no_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from distill_ray.teacher.vllm_engine import VllmEngine

    worker = CaptureWorker()
    worker._capture_store = RowStore()
    monkeypatch.setattr("os._exit", lambda _: pytest.fail("ended the process"))
    engine = object.__new__(VllmEngine)
    engine._engine = SimpleNamespace(collective_rpc=lambda name, args: [["", b""], getattr(worker, name)(*args)])
    with pytest.raises(DistillError, match=r"capture_fetch failed inside vLLM's worker: KeyError: 's0'\. Use .* lower"):
        engine._fetch([(0, "s0")], [np.zeros(2, np.int32)])
    assert "Traceback" in capsys.readouterr().err


def test_why_the_public_path_is_taken_travels_with_every_unit():
    from distill_ray.capture.stages import ReadUnit, teach
    from distill_ray.schema import SourceSlice, Unit
    from distill_ray.teacher.vllm_paths import may_fall_back

    unknown, cpu = "vLLM 9.9 is not one of 0.32", TeacherSection(model="m", use_gpu=False)
    notes = may_fall_back("auto", unknown, cpu, CaptureSection())
    assert notes == ("vLLM's public path is used (vLLM 9.9 is not one of 0.32): several times slower, no entropy",)
    assert may_fall_back("flat", None, cpu, CaptureSection()) == ()
    gpu = TeacherSection(model="m")
    with pytest.raises(CannotCaptureError, match=r"9\.9 is not one of 0\.32.*set teacher\.public_path = true"):
        may_fall_back("auto", unknown, gpu, CaptureSection())
    assert may_fall_back("auto", unknown, gpu.model_copy(update={"public_path": True}), CaptureSection()) == notes
    assert may_fall_back("flat", None, gpu, CaptureSection()) == ()
    engine: Any = SimpleNamespace(version="vllm 9.9", notes=notes, score=lambda _: [])
    unit = Unit("0" * 32, SourceSlice("a.txt", "0" * 64, "file", 0, 1), 1)
    taught = teach(engine, ReadUnit(unit, [], []))
    assert (taught.notes, taught.engine) == (notes, "vllm 9.9")
