"""Creating a run's objects from inside the cluster: what the pod of the weekly CronJob does."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from distill_ray.errors import DistillError, UserError
from distill_ray.render.pods import Manifest

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PATHS = {"ConfigMap": "/api/v1/namespaces/{}/configmaps", "RayJob": "/apis/ray.io/v1/namespaces/{}/rayjobs"}
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class ApiServer:
    """Kubernetes' API, and how to be known to it."""

    url: str
    token: str
    tls: ssl.SSLContext | None = None

    @classmethod
    def of_this_pod(cls) -> ApiServer:
        """The API server of the cluster that this process runs in.

        Raises:
            UserError: it does not run in a pod with a service account.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        if host is None or port is None or not (_ACCOUNT / "token").exists():
            raise UserError(
                "--create works inside a pod that has a service account; elsewhere use `distill-ray render … | kubectl "
                "create -f -`"
            )
        host = f"[{host}]" if ":" in host else host
        tls = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
        return cls(f"https://{host}:{port}", (_ACCOUNT / "token").read_text().strip(), tls)


def create(documents: list[Manifest], server: ApiServer) -> list[str]:
    """Create the recipe's ConfigMap and the RayJob; one that is there already is left as it is.

    A second firing in one week finds the week's RayJob by its name: nothing is started or changed.

    Args:
        documents: of kind rayjob; the accounts among them are the CronJob's business and left out.
        server: where to.

    Returns:
        One line for each object.

    Raises:
        UserError: the documents are not of kind rayjob, the service account may not create them, or KubeRay's types are
            not installed.
        DistillError: the API server refused, or does not answer.
    """
    if not any(document["kind"] == "RayJob" for document in documents):
        raise UserError("--create makes a run; use it with --kind rayjob")
    return [_create(document, server) for document in documents if document["kind"] in _PATHS]


def _create(document: Manifest, server: ApiServer) -> str:
    kind, name = document["kind"], document["metadata"]["name"]
    path = _PATHS[kind].format(document["metadata"]["namespace"])
    request = urllib.request.Request(
        # Else an unknown field would be dropped without a word.
        f"{server.url}{path}?fieldValidation=Strict&fieldManager=distill-ray",
        data=json.dumps(document).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {server.token}"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=server.tls):
            return f"{kind} {name}: created"
    except urllib.error.HTTPError as error:
        if error.code == 409:
            return f"{kind} {name}: is there already, and left as it is"
        said = error.read(2000).decode(errors="replace")
        if error.code in (401, 403, 404):
            raise UserError(
                f"Kubernetes refuses to create {kind} {name} ({error.code}); apply the manifests of --kind cronjob, "
                f"which hold the rights, and install KubeRay. It says: {said}"
            ) from error
        raise DistillError(f"Kubernetes refused {kind} {name} ({error.code}): {said}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise DistillError(f"Kubernetes does not answer at {server.url}: {error}; the CronJob tries again") from error
