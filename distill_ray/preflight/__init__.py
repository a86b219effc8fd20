"""`distill-ray check`: everything that can be known before money is spent.

check.py     the checks in their order, and those of batches and models
hardware.py  GPUs, CPUs and labelled nodes
software.py  what is installed where it is needed, and whether the store is reached from there
"""

from distill_ray.preflight.check import check
from distill_ray.preflight.finding import Finding

__all__ = ["Finding", "check"]
