"""`distill-ray status`: where a run stands, from storage alone.

run.py       the stages, who works on them, what the next `run` would do
progress.py  how far capture and training are, and what they took
"""

from distill_ray.status.run import Status, status

__all__ = ["Status", "status"]
