"""What happens to one unit, stage by stage. The functions know nothing of Ray.

Between stages a unit travels as one row with one large binary column: no block can split it, and no token becomes a
Python object.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from distill_ray import corpus, targets
from distill_ray.config.generate import GenerateSection
from distill_ray.config.sections import CorpusSection
from distill_ray.cost import ActorTime, Beat, Stopwatch, node_type
from distill_ray.errors import DistillError, IntegrityError
from distill_ray.schema import UNKNOWN_RECORD, DeadLetter, Sequence, TargetRows, Unit, UnitSummary
from distill_ray.storage import ConflictError, NotFoundError, Storage, StorageError, stage_folder
from distill_ray.targets import CaptureIdentity
from distill_ray.teacher import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EngineFactory = Callable[[], Engine]
"""Opens the engine in the process that calls it; picklable."""

FAILED_STARTS = 3
"""Starts of a teacher that fail one after the other before the run does."""
_AFTER_FAILED_START_S = 20.0
"""Seconds between two of them: the memory of a GPU comes back some seconds after the process that held it."""
_WRITES = 20
"""Attempts at writing one object that another driver writes too."""


@dataclass(frozen=True)
class ReadUnit:
    """A unit after tokenising."""

    unit: Unit
    sequences: list[Sequence]
    dead: list[DeadLetter]
    prompts: bool = False
    """The sequences are to be answered."""
    witnesses: int = 0
    """Sequences of which the teacher is to leave a witness (`targets.write_witness`)."""


@dataclass(frozen=True)
class TaughtUnit:
    """A unit with the teacher's rows: `rows[i]` belongs to `sequences[i]`."""

    unit: Unit
    sequences: list[Sequence]
    rows: list[TargetRows]
    dead: list[DeadLetter]
    seconds: float
    witness: Mapping[int, targets.Witness]
    """By place in `sequences`."""
    engine: str = ""
    """What computed them, and its version."""
    notes: tuple[str, ...] = ()
    """What the user should know of the engine."""
    spent: ActorTime | None = None
    """All that its teacher's actor has spent by now."""


def to_row(value: Any) -> pa.Table:
    """One object as a table of one row; `from_row` gives it back. Sizes beyond 2 GiB are fine."""
    return pa.table({"unit": pa.array([pickle.dumps(value, protocol=5)], pa.large_binary())})


def from_row(table: pa.Table) -> Any:
    """The object of a one-row table made by `to_row` in this very pipeline."""
    return pickle.loads(table.column("unit")[0].as_buffer())


def read(
    unit: Unit,
    section: CorpusSection,
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int | None = None,
    generate: GenerateSection | None = None,
    witnesses: int = 0,
) -> ReadUnit:
    """Read one source slice and turn it into sequences, or with `generate` into prompts."""
    if generate is not None:
        prompts, dead = corpus.read_unit_prompts(unit, section, generate, tokenizer, most_tokens=most_tokens)
        return ReadUnit(unit, prompts, dead, prompts=True, witnesses=witnesses)
    sequences, dead = corpus.read_unit_sequences(unit, section, tokenizer, most_tokens=most_tokens)
    return ReadUnit(unit, sequences, dead, witnesses=witnesses)


def teach(engine: Engine, work: ReadUnit) -> TaughtUnit:
    """Score one unit, or answer and score its prompts.

    A sequence that the teacher refuses becomes a dead letter and the others go on.
    """
    started = time.monotonic()
    results = list(_answered(engine, work.sequences) if work.prompts else _scored(engine, work.sequences))
    seconds = time.monotonic() - started
    kept, rows, dead = list[Sequence](), list[TargetRows](), list(work.dead)
    for result in results:
        if isinstance(result, str):
            dead.append(DeadLetter(work.unit.hash, work.unit.source.uri, UNKNOWN_RECORD, result))
        else:
            kept.append(result[0])
            rows.append(result[1])
    witness, notes = _scored_again(engine, work.unit, kept, work.witnesses)
    return TaughtUnit(work.unit, kept, rows, dead, seconds, witness, engine.version, (*engine.notes, *notes))


def _scored(engine: Engine, sequences: list[Sequence]) -> Iterator[tuple[Sequence, TargetRows] | str]:
    results = engine.score([s.tokens for s in sequences]) if sequences else []
    for i, (sequence, rows) in enumerate(zip(sequences, results, strict=True)):
        yield f"sequence {i} ({len(sequence.tokens)} tokens): {rows}" if isinstance(rows, str) else (sequence, rows)


def _scored_again(
    engine: Engine, unit: Unit, sequences: list[Sequence], count: int
) -> tuple[dict[int, targets.Witness], tuple[str, ...]]:
    """Witnesses by place; what went wrong with them costs no row: the audit can load the teacher instead."""
    chosen = targets.places(unit.hash, len(sequences), count)
    tokens = [sequences[i].tokens for i in chosen]
    try:
        again = engine.score_again(tokens) if tokens else None
    except DistillError as error:
        return {}, (f"no second answer for the audit: {error}",)
    return dict(zip(chosen, map(targets.Witness, tokens, again), strict=True)) if again else {}, ()


def _answered(engine: Engine, prompts: list[Sequence]) -> Iterator[tuple[Sequence, TargetRows] | str]:
    """Prompt and completion as one sequence, of which the completion is supervised."""
    found = engine.answer([p.tokens for p in prompts]) if prompts else []
    for prompt, answers in zip(prompts, found, strict=True):
        for answer in answers:
            if isinstance(answer, str):
                yield answer
                continue
            written = np.arange(len(answer.tokens)) >= len(prompt.tokens)
            yield Sequence(answer.tokens, written, prompt.doc_key, answer.finish), answer.rows


def write(storage: Storage, identity: CaptureIdentity, taught: TaughtUnit) -> UnitSummary:
    """Encode one unit and write its object in one piece.

    A whole object that is there already stays: another run of the same capture may have recorded its checksum. Its
    rows are the same within the engine's arithmetic, so it is used as it is.
    """
    data, summary = targets.encode_unit(
        identity, taught.unit, taught.sequences, taught.rows, taught.dead, taught.seconds, taught.engine
    )
    key = targets.unit_key(identity, taught.unit.hash)
    for _ in range(_WRITES):
        # Before it is read: only the very object that is found broken may be replaced.
        info = storage.head(key)
        try:
            if info is not None:
                found = targets.read_unit(storage, identity, taught.unit.hash).summary()
                return replace(found, teacher_seconds=taught.seconds)
        except (IntegrityError, NotFoundError):
            pass  # replaced below: the unit is here because its object was missing or broken
        try:
            storage.put_if(key, data, None if info is None else info.version)
        except ConflictError:
            continue
        if taught.witness:
            targets.write_witness(storage, identity, taught.unit.hash, taught.witness)
        return summary
    raise StorageError(f"{storage.uri}/{key}: {_WRITES} writes in a row met another writer's; run again")


def not_started(why: str) -> DistillError:
    """What to tell the user of a teacher that cannot start."""
    return DistillError(
        f"a teacher could not be started, {FAILED_STARTS} times in a row; what is finished is kept. {why}"
    )


class Teacher:
    """The actor of the pool: one engine for its lifetime, one unit a call, and two calls at a time.

    While one call has the engine, the other unpickles its unit or pickles what came out of the one before: the engine
    goes on with the next unit the moment it is done with one.

    Args:
        engine_factory: opens the engine.
        model: folder of the weights, staged to this machine beforehand so that loading is timed apart from it.
        meter: actor to which it posts its seconds; None: nobody wants to know.
    """

    def __init__(self, engine_factory: EngineFactory, model: str, meter: Any = None) -> None:
        # Ray passes on an error of a constructor as text only. Raised by the first call, it arrives as what it is.
        self._refused: DistillError | None = None
        self._watch = Stopwatch(node_type=node_type())
        self._beat = Beat(self._watch, meter)
        # Calls come from several threads; an engine may keep state of the thread that uses it, as CUDA does.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        try:
            if died := self._beat.starting():
                if died == FAILED_STARTS:
                    raise not_started("Its process died each time: out of memory, or what its log on the node says")
                time.sleep(_AFTER_FAILED_START_S)
            stage_folder(model)
            self._watch.enter("loading")
            self._engine = engine_factory()
            self._watch.enter("idle")
            self._beat.ready()
        except DistillError as error:
            self._refused = error
        except Exception:
            traceback.print_exc()
            time.sleep(_AFTER_FAILED_START_S)
            raise

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._refused is not None:
            raise self._refused
        return to_row(self._thread.submit(self._teach, from_row(table)).result())

    def _teach(self, work: ReadUnit) -> TaughtUnit:
        self._watch.enter("busy")
        taught = teach(self._engine, work)
        self._watch.enter("idle")
        self._watch.did(1, sum(len(s.tokens) for s in taught.sequences))
        self._beat.post()
        return replace(taught, spent=self._watch.read())
