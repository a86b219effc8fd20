"""What a run costs: device seconds of every command, dollars by stated prices, and when a student has paid for itself.

spent.py      seconds of one process, and their sum
meter.py      how they come from many processes into storage while a stage runs
usage.py      the objects of the run's folder, and sums over them
prices.py     dollars
breakeven.py  against serving the teacher
forecast.py   what all of it will be, before it runs
account.py    the report's section
"""

from distill_ray.cost.account import Stored, TargetsTime, account, measured
from distill_ray.cost.breakeven import break_even, sentence
from distill_ray.cost.forecast import (
    FORECAST,
    Basis,
    Forecast,
    Rate,
    StageForecast,
    StoredForecast,
    compared,
    forecast_sentence,
    stage_forecast,
    stored_forecast,
)
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
    "FORECAST",
    "TOTAL",
    "ActorTime",
    "Basis",
    "Beat",
    "Forecast",
    "Meter",
    "NodeUsage",
    "Rate",
    "StageForecast",
    "StageUsage",
    "Stopwatch",
    "Stored",
    "StoredForecast",
    "TargetsTime",
    "TimeSum",
    "Usage",
    "account",
    "break_even",
    "by_stage",
    "compared",
    "device_hours",
    "dollars_by_stage",
    "forecast_sentence",
    "held",
    "hours_held",
    "measured",
    "metered",
    "node_type",
    "read_usage",
    "sentence",
    "stage_forecast",
    "stored_forecast",
    "write_usage",
]
