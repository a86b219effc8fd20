"""What one rank does for long leaves no other waiting in a collective beyond the process group's timeout."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path

import pytest
import torch

from distill_ray.errors import DistillError
from distill_ray.train import meeting
from tests.ranks import spawn

TIMEOUT_S, WORK_S = 5, 9


def _work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=dt.timedelta(seconds=TIMEOUT_S),
    )
    meeting._MEET_S = 0.5

    def act() -> str:
        if rank == 0:
            time.sleep(WORK_S)
        return f"rank {rank}"

    answers = meeting.patiently(act)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(answers))


def test_ranks_wait_longer_than_the_groups_timeout(tmp_path: Path) -> None:
    spawn(_work, (str(tmp_path),), 2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [["rank 0", "rank 1"]] * 2


def test_an_error_is_raised_where_it_arose(tmp_path: Path) -> None:
    def act() -> None:
        raise DistillError("the store is down")

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(DistillError, match="the store is down"):
            meeting.patiently(act)
    finally:
        torch.distributed.destroy_process_group()
