"""What a run will take, before anything runs: the tokens of its corpus by rates that were stated or measured.

amounts.py  what of the corpus is captured already, exactly, and the rest from a sample
rates.py    stated by the recipe, or measured by the newest version that can speak for this one
verb.py     both together, as `distill_ray.cost.forecast` reckons them
"""

from distill_ray.forecast.verb import predict

__all__ = ["predict"]
