"""What an actor beside the driver gets to see."""

from __future__ import annotations

import os

import pytest
import ray

from distill_ray.session import on_this_node


class _Environment:
    def of(self, name: str) -> str | None:
        return os.environ.get(name)


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_beside_the_driver_has_its_ray_settings_and_the_jobs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_SOMETHING", "given to the command")
    actor = ray.remote(_Environment).options(**on_this_node()).remote()
    found = [ray.get(actor.of.remote(name)) for name in ("RAY_TRAIN_SOMETHING", "HF_HUB_OFFLINE")]
    assert found == ["given to the command", "1"]
    ray.kill(actor)
