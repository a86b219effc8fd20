"""One boto3 client per process, environment and patience: building one costs some 100 ms, using it is thread-safe."""

from __future__ import annotations

import os
import threading

from botocore.client import BaseClient

from distill_ray.storage.base import StorageError

# A key holds the process id because a client's sockets must not be shared by the two sides of a fork, and the AWS
# variables because the endpoint and the keys may differ between two stores opened in turn.
_clients: dict[tuple[int, bool, tuple[tuple[str, str], ...]], BaseClient] = {}
_lock = threading.Lock()


def s3_client(*, quick: bool = False) -> BaseClient:
    """A client from boto3's default, refreshable credential chain.

    Args:
        quick: give up after two attempts of a few seconds (for checks); otherwise eight, some minutes in all.

    Raises StorageError where the AWS settings cannot be read.
    """
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    key = (os.getpid(), quick, settings)
    with _lock:
        if key not in _clients:
            _clients[key] = _build(quick)
        return _clients[key]


def _build(quick: bool) -> BaseClient:
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 2 if quick else 8},
        connect_timeout=3 if quick else 5,
        read_timeout=4 if quick else 30,
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    try:
        # The default session is shared and not safe to use from several threads.
        return Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"the AWS settings cannot be used: {error}; check AWS_ENDPOINT_URL, AWS_PROFILE and the AWS configuration"
        ) from error
