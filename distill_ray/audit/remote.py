"""The teacher in one Ray actor, seen from the driver as calls that a stop interrupts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distill_ray import corpus, teacher
from distill_ray.audit.tolerance import Tolerance
from distill_ray.audit.unit import Found, SequenceFigures, check_unit, open_scorer, score_again
from distill_ray.config import Recipe
from distill_ray.cost import Beat, Stopwatch, node_type
from distill_ray.errors import DistillError, StoppedError
from distill_ray.schema import Unit
from distill_ray.session import died, is_death, note_full
from distill_ray.storage import Storage, stage_folder
from distill_ray.targets import CaptureIdentity

if TYPE_CHECKING:
    from ray.exceptions import RayError

_POLL_S = 0.2
_RESTARTS = 1
"""How often a teacher whose process died is started again."""


class Auditor:
    """The actor: one engine for its lifetime."""

    def __init__(
        self,
        recipe: Recipe,
        storage: Storage,
        identity: CaptureIdentity,
        engine: str,
        tolerance: Tolerance,
        meter: Any = None,
    ) -> None:
        self._watch = Stopwatch(node_type=node_type())
        self._beat = Beat(self._watch, meter)
        self._recipe, self._storage, self._identity, self._tolerance = recipe, storage, identity, tolerance
        # Ray passes on an error of a constructor as text only. Raised by the first call, it arrives as what it is.
        self._refused: DistillError | None = None
        try:
            folder = stage_folder(recipe.teacher.model)
            self._watch.enter("loading")
            self._scorer = open_scorer(recipe, identity, engine)
            self._tokenizer = corpus.load_tokenizer(folder, recipe.teacher.trust_remote_code)
            self._watch.enter("idle")
        except DistillError as error:
            self._refused = error

    def check(self, unit: Unit, object_sha256: str) -> Found | None:
        """`check_unit`."""
        if self._refused is not None:
            raise self._refused
        return check_unit(self._storage, self._identity, self._recipe, self._tokenizer, unit, object_sha256)

    def score(self, unit: str, sequences: tuple[int, ...]) -> SequenceFigures:
        """`score_again`."""
        self._watch.enter("busy")
        found = score_again(self._storage, self._identity, self._scorer, self._tolerance, unit, sequences)
        self._watch.enter("idle")
        self._watch.did(len(sequences), found.rows)
        self._beat.deliver()  # the driver, once it has the last figures, ends the meter
        return found


class RemoteAuditor:
    """Calls to the actor; each waits for its answer or for a stop."""

    def __init__(self, actor: Any, stop: threading.Event) -> None:
        self._actor, self._stop = actor, stop

    def check(self, unit: Unit, object_sha256: str) -> Found | None:
        return self._answer(self._actor.check.remote(unit, object_sha256))

    def score(self, unit: str, sequences: tuple[int, ...]) -> SequenceFigures:
        return self._answer(self._actor.score.remote(unit, sequences))

    def _answer(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        while not ray.wait([reference], timeout=_POLL_S)[0]:
            if self._stop.is_set():
                raise StoppedError("the audit was stopped; the same command begins it anew, all targets are kept")
        try:
            return ray.get(reference)
        except RayTaskError as error:
            # Ray's wrapper carries the worker's traceback as its message; a user wants the message alone.
            if isinstance(error.cause, DistillError):
                raise error.cause from error
            raise
        except RayError as error:
            raise _own_error(error) from error


def _own_error(error: RayError) -> BaseException:
    """What the user is told of a teacher that Ray lost or could not start; the error itself where it is neither."""
    from ray.exceptions import RayActorError

    if is_death(error):
        return died(
            f"the teacher's process died {_RESTARTS + 1} times during the audit, which may go by the other engine "
            "([audit] engine)",
            error,
        )
    if isinstance(error, RayActorError):
        return DistillError(f"the audit's teacher could not be started. {error}")
    return error


@contextmanager
def remote_auditor(
    recipe: Recipe,
    storage: Storage,
    identity: CaptureIdentity,
    engine: str,
    tolerance: Tolerance,
    stop: threading.Event,
    note: Callable[[str], None],
    meter: Any = None,
) -> Iterator[RemoteAuditor]:
    """An actor with the resources of a capture's teacher, gone at the end. Ray must be initialised.

    `note` is told where the cluster has no room for it; `meter` is the actor to which it posts its seconds.
    """
    import ray

    selector = recipe.cluster.selector("teacher")
    note_full("the audit's teacher", teacher.needed_resources(recipe.teacher), note, stop, selector)
    remote: Any = ray.remote(Auditor).options(
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
        **teacher.actor_resources(recipe.teacher, selector),
        **recipe.cluster.environments.teacher.options(),
    )
    actor = remote.remote(recipe, storage, identity, engine, tolerance, meter)
    try:
        yield RemoteAuditor(actor, stop)
    finally:
        # vLLM's own processes end with the one that started them.
        ray.kill(actor, no_restart=True)
