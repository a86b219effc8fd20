"""`distill-ray gc`: what no run refers to any more, and sources that were withdrawn.

references.py   what the runs' records refer to
garbage.py      what they do not, by kind, and its removal
forget.py       a withdrawn source: its rows in every capture, and who was trained on them
"""

from distill_ray.gc.forget import Found, find, forget
from distill_ray.gc.garbage import Garbage, collect, remove

__all__ = ["Found", "Garbage", "collect", "find", "forget", "remove"]
