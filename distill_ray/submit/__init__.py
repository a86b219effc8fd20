"""`distill-ray submit`, `logs`, `stop`: a run as a job of a Ray cluster, through the Jobs API of its dashboard.

naming.py   submission ids, from name and version
package.py  the code and the recipe that travel with the job
client.py   the dashboard over HTTP, and what its refusals mean
room.py     whether the cluster can hold the run
job.py      submit or attach, stop, and where the job stands
follow.py   the job's log, live; waiting for its end
"""

from distill_ray.submit.client import connect
from distill_ray.submit.follow import LogView, show_logs, wait
from distill_ray.submit.job import Submitted, describe, stop, submit

__all__ = ["LogView", "Submitted", "connect", "describe", "show_logs", "stop", "submit", "wait"]
