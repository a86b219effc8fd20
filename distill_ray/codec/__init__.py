"""Codec v1: the teacher's top k as fixed-stride rows of bytes. Pure numpy, no I/O."""

from distill_ray.codec.packed import (
    CODEC_VERSION,
    LOG_FLOOR,
    MAX_GAP,
    at_temperature,
    decode,
    encode,
    row_bytes,
)

__all__ = ["CODEC_VERSION", "LOG_FLOOR", "MAX_GAP", "at_temperature", "decode", "encode", "row_bytes"]
