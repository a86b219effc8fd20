"""Training: a Ray Train worker group under DeepSpeed that restores, iterates, computes the loss, steps and saves.

Layout: `driver` starts the group, relays progress and stops it; `worker` is the training function; `restoring` finds
a checkpoint every rank agrees on; `result` stores the trained folder; `board` is the actor between driver and workers.
"""

from distill_ray.train.driver import run
from distill_ray.train.result import damage

__all__ = ["damage", "run"]
