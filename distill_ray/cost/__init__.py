"""What a run costs: device seconds of every command, dollars by stated prices, and when a student has paid for itself.

spent.py      seconds of one process, and their sum
meter.py      how they come from many processes into storage while a stage runs
usage.py      the objects of the run's folder, and sums over them
prices.py     dollars
breakeven.py  against serving the teacher
account.py    the report's section
"""

from distill_ray.cost.account import Stored, TargetsTime, account, measured
from distill_ray.cost.breakeven import break_even, sentence
from distill_ray.cost.meter import Beat, Meter, held, metered, node_type
from distill_ray.cost.prices import TOTAL, dollars_by_stage
from distill_ray.cost.spent import ActorTime, Stopwatch, TimeSum
from distill_ray.cost.usage import (
    NodeUsage,
    StageUsage,
    Usage,
    by_stage,
    device_hours,
    hours_held,
    read_usage,
    write_usage,
)

__all__ = [
    "TOTAL",
    "ActorTime",
    "Beat",
    "Meter",
    "NodeUsage",
    "StageUsage",
    "Stopwatch",
    "Stored",
    "TargetsTime",
    "TimeSum",
    "Usage",
    "account",
    "break_even",
    "by_stage",
    "device_hours",
    "dollars_by_stage",
    "held",
    "hours_held",
    "measured",
    "metered",
    "node_type",
    "read_usage",
    "sentence",
    "write_usage",
]
