"""The cluster's dashboard over HTTP: Ray's own client with time limits, and its refusals as errors with a remedy."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from distill_ray.errors import DistillError, UserError

_CONNECT_S, _READ_S = 10.0, 120.0
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class RefusedError(DistillError, RuntimeError):
    """The dashboard answered a request with an error; Ray's client would raise a RuntimeError."""


class Client(JobSubmissionClient):
    """Raises UserError where the dashboard is away or refuses the token, RefusedError for what it answers else."""

    def _raise_error(self, r: requests.Response) -> NoReturn:
        raise RefusedError(f"{self._address} answers {r.status_code}: {r.text[-2000:]}")

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        try:
            # Ray's own requests wait for ever.
            return super()._do_request(method, endpoint, timeout=(_CONNECT_S, _READ_S), **options)
        except AuthenticationError:
            raise UserError(_refused(self._address, bool(self._headers))) from None
        except requests.RequestException as error:
            raise UserError(
                f"no Ray dashboard answers at {self._address}: {_reason(error)}; give the http:// address of the head "
                "node's dashboard (port 8265), as it can be reached from here"
            ) from error

    def read(self, endpoint: str) -> dict[str, Any]:
        """The `data` of one of the dashboard's own pages. Raises DistillError."""
        response = self._do_request("GET", endpoint)
        try:
            body = response.json()
            if response.status_code == requests.codes.ok and body["result"]:
                return body["data"]
        except (ValueError, KeyError, TypeError):
            pass  # said below, with what came instead
        raise DistillError(f"{self._address}{endpoint} answers {response.status_code}: {response.text[:200]}")


def connect(address: str) -> Client:
    """A client of the dashboard at `address` (`http://…:8265`), whose token, if any, is accepted.

    The token comes from where Ray has it: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or its file in
    the home folder.

    Raises:
        UserError: nothing answers there, it is no Ray dashboard, or it refuses the token.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: jobs go through the dashboard of the cluster; give its http:// address, port 8265"
        )
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # it tells of every upload
    try:
        with _address_counts():
            client = Client(address)
        client.list_jobs()
    except AuthenticationError:  # Ray found no token to send, and sent nothing
        raise UserError(_refused(address, False)) from None
    except (requests.RequestException, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"what answers at {address} is no Ray dashboard ({_reason(error)}); give the http:// address of the head "
            "node's dashboard (port 8265)"
        ) from error
    return client


@contextmanager
def _address_counts() -> Iterator[None]:
    """Ray lets RAY_ADDRESS replace the address that its client is given; here what the user wrote counts."""
    taken = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _refused(address: str, sent: bool) -> str:
    if sent:
        return f"the cluster at {address} refuses the token that was sent; set RAY_AUTH_TOKEN to the cluster's own"
    ways = "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file that holds it)"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"the cluster at {address} asks for a token; set RAY_AUTH_MODE=token and {ways}"
    return f"the cluster at {address} asks for a token and none is known here; set {ways}"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
