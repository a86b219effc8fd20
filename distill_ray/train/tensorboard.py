"""`<run>/tensorboard/`: the lines of metrics.jsonl as one TensorBoard event file.

The file is a pure function of the lines, and written whole at every checkpoint and at the end: a resumed run, whose
lines have each step once, has no step twice.
"""

from __future__ import annotations

import struct
from typing import Any

from distill_ray.lease import LeaseToken, put_owned
from distill_ray.storage import Storage
from distill_ray.train.bad_loss import Line

_NAME = "events.out.tfevents.metrics"
"""TensorBoard reads files with `tfevents` in their name."""
_NOT_SHOWN = ("step", "time", "batch_id")
_GROUPS = {
    **dict.fromkeys(("loss", "ce", "kl_t", "kl_t1", "kept_mass", "top1_agreement"), "loss"),
    **dict.fromkeys(("lr", "grad_norm", "skipped", "tokens"), "optimizer"),
}
"""Figure → heading that TensorBoard shows it under; "speed" for the others."""


class EventFile:
    """Bytes of the file; what is made of a line once is kept, since the lines only become more."""

    def __init__(self) -> None:
        self._lines = 0
        self._data = bytearray(_record(_event(0.0, file_version="brain.Event:2")))

    def of(self, history: list[Line]) -> bytes:
        """The file of these lines, of which the ones given before are the first."""
        for line in history[self._lines :]:
            self._data += _record(_scalars(line))
        self._lines = len(history)
        return bytes(self._data)

    def store(self, storage: Storage, token: LeaseToken, history: list[Line]) -> None:
        """Write it under the run's prefix.

        Raises:
            LeaseLostError: another driver took the run over; its file stands.
        """
        put_owned(storage, token, f"{token.run_prefix}/tensorboard/{_NAME}", self.of(history))


def _event(at: float, **fields: Any) -> Any:
    from tensorboardX.proto import event_pb2

    proto: Any = event_pb2  # its classes are made at import
    return proto.Event(wall_time=at, **fields)


def _scalars(line: Line) -> Any:
    from tensorboardX.proto import summary_pb2

    proto: Any = summary_pb2
    values = [
        proto.Summary.Value(tag=f"{_GROUPS.get(name, 'speed')}/{name}", simple_value=value)
        for name, value in line.items()
        if name not in _NOT_SHOWN
    ]
    # A line from before lines had their time is put at the epoch.
    return _event(line.get("time", 0.0), step=int(line["step"]), summary=proto.Summary(value=values))


def _record(event: Any) -> bytes:
    """TFRecord framing: length, its checksum, data, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    from tensorboardX.crc32c import crc32c

    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
