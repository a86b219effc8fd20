"""The version of a weekly run that a RayCronJob started: `python -m distill_ray.render.week`."""

from __future__ import annotations

import datetime as dt
import os
import re

from distill_ray.config import iso_week

# A RayCronJob calls its jobs `<name>-<minutes since 1970>`, and KubeRay each attempt's cluster `<job>-<5 characters>`.
_ATTEMPT = re.compile(r".+-(\d{8})-[a-z0-9]{5}")


def version_of(cluster: str, now: dt.datetime) -> str:
    """ISO week of a job: of the time it was due where that is less than a week ago, else of now.

    An attempt after a failed one may start after Sunday midnight; it must go on with the run of the first one. A
    RayCronJob that was away for weeks makes up for every firing that it missed, all at once: those are one run, this
    week's.

    Args:
        cluster: name of the attempt's RayCluster, as KubeRay gives it in RAY_CLUSTER_NAME.
        now: an aware time.
    """
    now = now.astimezone(dt.UTC)
    if match := _ATTEMPT.fullmatch(cluster):
        due = dt.datetime.fromtimestamp(60 * int(match[1]), dt.UTC)
        if dt.timedelta(0) <= now - due < dt.timedelta(weeks=1):
            return iso_week(due.date())
    return iso_week(now.date())


if __name__ == "__main__":
    print(version_of(os.environ.get("RAY_CLUSTER_NAME", ""), dt.datetime.now(dt.UTC)))
