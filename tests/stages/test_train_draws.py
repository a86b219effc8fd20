"""Training on tokens drawn from the teacher: capture by the recipe's engine, store, packs, DeepSpeed, student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stages.test_train import new_run

pytestmark = pytest.mark.usefixtures("ray_cluster")

FULL = {"draws": 50, "draws_temperature": 2.0}
TAIL = {"draws": 12, "draws_from": "tail", "draws_temperature": 2.0}


@pytest.mark.long
@pytest.mark.parametrize(("objective", "capture"), [("sampled", FULL), ("head_tail", TAIL)])
def test_a_student_learns_from_drawn_tokens(tmp_path: Path, objective: str, capture: dict[str, Any]) -> None:
    run = new_run(
        tmp_path, capture=capture, loss={"objective": objective, "hard_label_weight": 0.0}, train={"epochs": 4}
    )
    assert run.manifest.identity.draws_from == capture.get("draws_from", "all")
    assert run.train()["step"] == len(run.history())
    lines = run.history()
    first, last = ([line["kl_t1"] for line in part] for part in (lines[:4], lines[-4:]))
    print(f"{objective}: KL at T = 1 from {sum(first) / 4:.3f} to {sum(last) / 4:.3f} in {len(lines)} steps")
    assert sum(last) < 0.8 * sum(first)
