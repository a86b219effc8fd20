"""A store that fails for a while, throttles, or gets and gives damaged bytes: whole in the end, or a clear failure."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore import exceptions as boto
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from distill_ray import checkpoints
from distill_ray.errors import IntegrityError
from distill_ray.lease import Lease
from distill_ray.storage import StorageError, open_storage
from distill_ray.storage.s3_errors import is_passing
from distill_ray.storage.s3_patience import persist
from tests.cluster.chaos.proxy import FaultProxy
from tests.s3server import S3Server
from tests.unit.test_storage_errors import FaultyNet


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server, tmp_path_factory.mktemp("proxy"), seed=5) as started, pytest.MonkeyPatch.context() as p:
        p.setenv("AWS_ENDPOINT_URL", started.endpoint)
        yield started


@pytest.fixture(autouse=True)
def calm_again(proxy: FaultProxy) -> Iterator[None]:
    proxy.rules()
    yield
    proxy.rules()


def answer(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Op")  # type: ignore


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (answer("SlowDown", 503), True),
        (answer("BadDigest", 400), True),
        (answer("502", 502), True),
        (answer("NotImplemented", 501), False),
        (answer("InsufficientStorage", 507), False),
        (answer("RequestTimeTooSkewed", 403), False),
        (answer("PreconditionFailed", 412), False),
        (answer("NoSuchKey", 404), False),
        (boto.EndpointConnectionError(endpoint_url="x"), True),
        (boto.SSLError(endpoint_url="x", error="y"), False),
        (boto.NoCredentialsError(), False),
        (ResponseParserError("no XML"), True),
    ],
)
def test_what_may_pass(error: Exception, passing: bool) -> None:
    assert is_passing(error) is passing


def test_patience_ends_at_once_without_an_outage_to_wait_for() -> None:
    tried: list[float] = []

    def request() -> None:
        tried.append(time.monotonic())
        raise answer("SlowDown", 503)

    with pytest.raises(ClientError):
        persist(request, 0.0)
    assert len(tried) == 1
    with pytest.raises(ClientError):
        persist(request, 1.0)
    assert 2 <= len(tried) - 1 <= 6


def test_an_outage_begins_with_the_first_failure_however_long_the_request_took() -> None:
    tried: list[float] = []

    def request() -> str:
        tried.append(time.monotonic())
        if len(tried) > 1:
            return "there"
        time.sleep(1.5)  # gigabytes on their way
        raise answer("SlowDown", 503)

    assert persist(request, 1.0) == "there"


@pytest.mark.long
def test_a_store_that_answered_before_is_waited_for_by_every_process(
    proxy: FaultProxy, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many requests at once spend botocore's shared budget of retries within seconds."""
    storage = open_storage(s3_uri)
    storage.put("k", b"1")
    sent = pickle.loads(pickle.dumps(storage))
    proxy.stop()
    back = threading.Timer(12.0, proxy.start)
    back.start()
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(lambda i: sent.get("k"), range(24))) == [b"1"] * 24
        list(pool.map(lambda i: sent.put_if(f"n/{i}", b"x", None), range(24)))
    back.join()
    assert len(list(sent.list("n/"))) == 24


FAULTS = {
    "slow down": {"probability": 0.3, "error": {"code": "SlowDown", "status": 503}},
    "resets": {"probability": 0.3, "reset": True},
    "cut uploads": {"probability": 0.3, "request": {"cut_upload": {"after_frac": 0.5}}},
    "streams that break off": {"probability": 0.3, "response": {"abort_frac": 0.5}},
    "corrupted bodies": {"probability": 0.3, "response": {"corrupt_bytes": 16}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_under_faults_is_stored_and_restored_whole(
    fault: str, proxy: FaultProxy, s3_uri: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(s3_uri)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(os.urandom(100_000))
    large.write_bytes(os.urandom(66 << 20))  # in parts, whose ranged reads carry no checksum
    with Lease.acquire(storage, "runs/a/b") as lease:
        proxy.rules(FAULTS[fault])
        files = checkpoints.upload(storage, lease.token, 4, [small, large])
        sums = {"loss": 1.0, "world_size": 1, "zero_stage": 1, "plan": "p"}
        checkpoints.publish(storage, lease.token, 4, files, **sums)
        manifest = checkpoints.latest_whole(storage, "runs/a/b")
        assert manifest is not None
        # Five damaged parts in seven make even three downloads fail now and then.
        proxy.rules(FAULTS[fault] | {"times": 4})
        checkpoints.restore(storage, manifest, ["small", "large"], tmp_path / "back")
        assert proxy.fired(), "no fault was met"
    for path in (small, large):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    # What lies in the store itself is whole, too.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    assert open_storage(s3_uri).get(manifest.key_of("large")) == large.read_bytes()


def test_bytes_damaged_on_every_way_are_refused_and_never_handed_over(
    proxy: FaultProxy, s3_uri: str, tmp_path: Path
) -> None:
    storage, path = open_storage(s3_uri), tmp_path / "large"
    path.write_bytes(os.urandom(66 << 20))
    with Lease.acquire(storage, "runs/a/b") as lease:
        files = checkpoints.upload(storage, lease.token, 4, [path])
        sums = {"loss": 1.0, "world_size": 1, "zero_stage": 1, "plan": "p"}
        manifest = checkpoints.publish(storage, lease.token, 4, files, **sums)
        proxy.rules({"operation": "GetObject", "response": {"corrupt_bytes": 16}})
        with pytest.raises(IntegrityError, match="its manifest says"):
            checkpoints.restore(storage, manifest, ["large"], tmp_path / "back")
        proxy.rules()
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.long
def test_a_listing_whose_second_page_fails_is_not_taken_for_complete(
    proxy: FaultProxy, s3_server: S3Server, s3_uri: str
) -> None:
    storage, client = open_storage(s3_uri), s3_server.client()
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: client.put_object(Bucket=bucket, Key=f"{prefix}/p/{i:04}"), range(1010)))
    keys = storage.list("p/")
    next(keys)
    proxy.rules({"operation": "ListObjectsV2", "times": 9, "error": {"code": "SlowDown", "status": 503}})
    assert len(list(keys)) == 1009
    proxy.rules({"operation": "ListObjectsV2", "times": 3, "response": {"corrupt_bytes": 16}})
    assert len(list(storage.list("p/"))) == 1010


def test_a_clock_that_is_off_is_told_at_once(proxy: FaultProxy, s3_uri: str) -> None:
    storage = open_storage(s3_uri)
    storage.put("k", b"1")
    proxy.rules({"error": {"code": "RequestTimeTooSkewed", "status": 403}})
    attempts = lambda: storage.get("k"), lambda: storage.put("k", b"2"), lambda: storage.put_if("n", b"", None)
    for attempt in attempts:
        with pytest.raises(StorageError, match="clock is off by more than 15 minutes: set it by NTP"):
            attempt()
    assert sum(proxy.fired().values()) == len(attempts), "asked again"
    proxy.rules()
    assert storage.get("k") == b"1"


def test_an_upload_damaged_on_its_way_is_refused_by_the_store_and_sent_again(
    s3_server: S3Server, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    with FaultyNet(s3_server.endpoint) as net:
        threading.Thread(target=net.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", net.url)
        storage = open_storage(s3_uri)
        storage.put("first", b"")
        net.damage = 3
        storage.upload(path, "file")
        assert net.damage == 0, "the damaged ones came through"
        net.damage = 2
        version = storage.put_if("k", b"x" * 1000, None)
        assert net.damage == 0
        assert storage.get_versioned("k") == (b"x" * 1000, version)
        assert storage.get("file") == path.read_bytes()
        net.shutdown()
