"""Codec v1: the teacher's top k as fixed-stride rows of bytes. No I/O.

`format` states the layout, `reference` is the codec in plain numpy, `packed` the compiled one, which is used;
`rounding` says what stored numbers can have been.
"""

from distill_ray.codec.format import CODEC_VERSION, LOG_FLOOR, MAX_GAP, MAX_VOCAB, row_bytes
from distill_ray.codec.packed import at_temperature, decode, encode
from distill_ray.codec.rounding import Interval, Unrounded, unrounded, unrounded_half, unrounded_log

__all__ = [
    "CODEC_VERSION",
    "LOG_FLOOR",
    "MAX_GAP",
    "MAX_VOCAB",
    "Interval",
    "Unrounded",
    "at_temperature",
    "decode",
    "encode",
    "row_bytes",
    "unrounded",
    "unrounded_half",
    "unrounded_log",
]
