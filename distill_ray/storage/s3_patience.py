"""Asking again where botocore has given up: its eight attempts outlast throttling, not an outage of a minute.

botocore also shares one budget of retries between all requests of a client: in an outage a few parallel uploads spend
it, and then every request fails at its first attempt.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from distill_ray.storage.s3_errors import BROKEN_BODY, S3_ERRORS, cause_of, is_passing

T = TypeVar("T")

OUTAGE_S = 180.0
"""Seconds that a store which has answered before is waited for."""
_BODY_ATTEMPTS = 10
"""Where a third of all bodies arrives damaged, one read in 170,000 fails."""
_SHORTEST_S, _LONGEST_S = 0.4, 10.0


def persist(request: Callable[[], T], outage_s: float) -> T:
    """`request`'s result; asked again, with growing pauses, while it fails in a way that may pass.

    Args:
        request: may be called many times.
        outage_s: seconds since the first failure after which no further attempt is made. A body that breaks off or does
            not match its checksum is read up to ten times, whatever this is.

    Raises what the last attempt raised.
    """
    since: float | None = None
    for attempt in itertools.count(1):
        try:
            return request()
        except S3_ERRORS as error:
            longest = _LONGEST_S
            # Not since the request began: gigabytes may have been on their way for longer than any outage.
            since = time.monotonic() if since is None else since
            if isinstance(cause_of(error), BROKEN_BODY):
                if attempt >= _BODY_ATTEMPTS:
                    raise
                longest = _SHORTEST_S
            elif not is_passing(error) or time.monotonic() - since >= outage_s:
                raise
        time.sleep(random.uniform(0.5, 1.0) * min(_SHORTEST_S * 2 ** (attempt - 1), longest))
    raise AssertionError("unreachable")
