"""Capture: pending units → read and tokenise → teacher → encode and write, as one Ray Data pipeline.

stages.py    what happens to one unit: pure functions and the teacher's actor
scaling.py   how many teachers a backlog is worth
dataset.py   the Ray Data pipeline over pending units
pool.py      the actor that iterates it, seen from the driver as a stream of summaries
verb.py      what is missing, the run over it, dead letters and the run manifest
"""

from distill_ray.capture.scaling import teachers_for
from distill_ray.capture.verb import capture_identity, damage, run

__all__ = ["capture_identity", "damage", "run", "teachers_for"]
