"""A run outlives the keys it started with: the one client of a process fetches new ones by itself."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from distill_ray.storage.s3_client import s3_client

PROVIDER = """
import datetime as dt, json, pathlib, sys
calls = pathlib.Path(sys.argv[1])
number = len(calls.read_text()) if calls.exists() else 0
calls.write_text("x" * (number + 1))
ends = dt.datetime.now(dt.timezone.utc) + dt.timedelta(minutes=1)
print(json.dumps({"Version": 1, "AccessKeyId": f"KEY{number}", "SecretAccessKey": "s", "SessionToken": "t",
                  "Expiration": ends.isoformat()}))
"""


def test_keys_about_to_expire_are_fetched_anew_by_the_same_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "provider.py").write_text(PROVIDER)
    process = f"{sys.executable} {tmp_path}/provider.py {tmp_path}/calls"
    (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\ncredential_process = {process}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    client, signed = s3_client(), []

    def answer(request: Any, **_: Any) -> AWSResponse:
        signed.append(str(request.headers["Authorization"]))
        return AWSResponse(request.url, 200, {}, SimpleNamespace(stream=lambda: [b""]))

    client.meta.events.register("before-send.s3", answer)
    for _ in range(2):
        assert s3_client() is client
        client.head_bucket(Bucket="bucket")
    used = [next(part for part in text.split("/") if "Credential=" in part).rpartition("=")[2] for text in signed]
    assert used[0] != used[1], used
