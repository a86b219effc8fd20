"""What processes of Ray's get to see."""

from __future__ import annotations

import os

import pytest
import ray

from distill_ray.session import on_this_node


class _Environment:
    def of(self, name: str) -> str | None:
        return os.environ.get(name)


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_beside_the_driver_has_its_ray_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_SOMETHING", "given to the command")
    actor = ray.remote(_Environment).options(**on_this_node()).remote()
    assert ray.get(actor.of.remote("RAY_TRAIN_SOMETHING")) == "given to the command"
    ray.kill(actor)


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_asks_no_hub() -> None:
    assert ray.get(ray.remote(_is_offline).remote())


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE
