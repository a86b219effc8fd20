"""One writer per run: taking, renewing, losing and taking over the lease, with real processes where it matters."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distill_ray.errors import IntegrityError, LeaseHeldError, LeaseLostError
from distill_ray.lease import (
    Lease,
    LeaseRecord,
    Owner,
    is_dead,
    is_live,
    publish,
    read_published,
    read_record,
    this_process,
)
from distill_ray.lease.owner import _start_of
from distill_ray.storage import Storage, StorageError, open_storage
from distill_ray.storage.local import LocalStorage

RUN = "runs/demo/v1"

# A driver: takes the lease, says so, then does what each line of its input asks for and says how it went.
DRIVER = """
import sys
from distill_ray.errors import DistillError
from distill_ray.lease import Lease, publish
from distill_ray.storage import open_storage
storage = open_storage(sys.argv[1])
try:
    lease = Lease.acquire(storage, sys.argv[2], ttl_s=float(sys.argv[3]))
except DistillError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(0)
print("taken", lease.token.epoch, flush=True)
for line in sys.stdin:
    try:
        if line.strip() == "check":
            lease.check()
        else:
            publish(storage, lease.token, line.strip(), {"by": lease.token.epoch})
        print("done", flush=True)
    except DistillError as error:
        print(type(error).__name__, error, flush=True)
"""


class Driver:
    """The script above as a process of its own."""

    def __init__(self, storage: Storage, ttl_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, storage.uri, RUN, str(ttl_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for each in started:
        each.end()


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri"))


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def elsewhere(**changes) -> Owner:
    """A driver on another machine, of which nothing but the record is known."""
    there = Owner("other", "far-host", 4711, "another-boot", "pid:[1]", "1")
    return replace(there, **changes)


def write_record(storage: Storage, owner: Owner, *, seconds_left: float, published: dict | None = None) -> None:
    record = LeaseRecord(owner, 7, time.time() + seconds_left, published or {})
    storage.put(f"{RUN}/lease.json", json.dumps(asdict(record)).encode())


def test_taken_published_released_taken_again(storage: Storage) -> None:
    assert read_record(storage, RUN) is None
    assert read_published(storage, RUN) == {}
    with Lease.acquire(storage, RUN) as lease:
        lease.check()
        assert lease.token.epoch == 1
        publish(storage, lease.token, "targets", {"key": "t", "n": 1})
        publish(storage, lease.token, "checkpoint/step-1", {"key": "c"})
        publish(storage, lease.token, "targets", {"key": "t", "n": 2})
        publish(storage, lease.token, "checkpoint/step-1", None)
        publish(storage, lease.token, "never-there", None)
        record = read_record(storage, RUN)
        assert record is not None
        assert is_live(record)
        assert record.expires_at - time.time() == pytest.approx(60, abs=5)
    assert read_published(storage, RUN) == {"targets": {"key": "t", "n": 2}}
    released = read_record(storage, RUN)
    assert released is not None
    assert not is_live(released)
    with pytest.raises(LeaseLostError, match="released"):
        publish(storage, lease.token, "late", {})
    with Lease.acquire(storage, RUN) as again:
        assert again.token.epoch == 2
        assert read_published(storage, RUN) == {"targets": {"key": "t", "n": 2}}


def test_second_driver_refuses_and_names_the_owner(local: Storage) -> None:
    with Lease.acquire(local, RUN), pytest.raises(LeaseHeldError) as caught:
        Lease.acquire(local, RUN)
    text = str(caught.value)
    for part in (this_process().host, f"process {os.getpid()}", "epoch 1", "60 s", "wait for it"):
        assert part in text
    assert caught.value.exit_code == 2


def test_two_processes_at_once_and_one_works(storage: Storage, drivers: list[Driver]) -> None:
    drivers += [Driver(storage, 60), Driver(storage, 60)]
    assert sorted(each.says().split()[0] for each in drivers) == ["LeaseHeldError", "taken"]


@pytest.mark.parametrize("state", ["none", "expired", "released"])
def test_eight_threads_at_once_and_one_works(local: Storage, state: str) -> None:
    if state != "none":
        write_record(local, elsewhere(), seconds_left=-1 if state == "expired" else -time.time())
    barrier = threading.Barrier(8)

    def attempt(_: int) -> Lease | None:
        barrier.wait()
        try:
            return Lease.acquire(local, RUN)
        except LeaseHeldError:
            return None

    with ThreadPoolExecutor(8) as pool:
        won = [each for each in pool.map(attempt, range(8)) if each]
    assert [each.token.epoch for each in won] == [1 if state == "none" else 8]
    won[0].release()


def test_driver_elsewhere_keeps_its_lease_until_it_expires(local: Storage) -> None:
    write_record(local, elsewhere(), seconds_left=30, published={"targets": {"key": "t"}})
    with pytest.raises(LeaseHeldError, match=r"far-host, process 4711 \(epoch 7.* (29|30) s"):
        Lease.acquire(local, RUN)
    write_record(local, elsewhere(), seconds_left=-0.1, published={"targets": {"key": "t"}})
    with Lease.acquire(local, RUN) as lease:
        assert lease.token.epoch == 8
        assert read_published(local, RUN) == {"targets": {"key": "t"}}


def test_killed_driver_of_this_machine_is_seen_dead_at_once(storage: Storage, drivers: list[Driver]) -> None:
    drivers.append(Driver(storage, 600))
    assert drivers[0].says() == "taken 1"
    with pytest.raises(LeaseHeldError):
        Lease.acquire(storage, RUN)
    drivers[0].process.kill()
    time.sleep(0.2)  # not waited for: it is a zombie now, as under a parent that was paused
    with Lease.acquire(storage, RUN) as lease:
        assert lease.token.epoch == 2


def test_death_is_known_of_this_boot_and_namespace_only() -> None:
    me = this_process()
    assert me.boot_id
    assert me.pid_namespace
    assert not is_dead(me)
    assert is_dead(replace(me, started="1"))  # the pid went to another process
    assert is_dead(replace(me, pid=2**22 + 1))
    gone = replace(me, pid=2**22 + 1)
    assert not is_dead(replace(gone, boot_id="another"))
    assert not is_dead(replace(gone, pid_namespace="pid:[1]"))
    assert not is_dead(replace(gone, boot_id=""))


def test_a_live_process_is_not_dead_because_proc_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    me = this_process()
    monkeypatch.setattr("distill_ray.lease.owner._start_of", lambda _: None)
    hidden = this_process()
    assert hidden.started == ""
    assert not is_dead(me)
    assert is_dead(replace(me, pid=2**22 + 1))
    monkeypatch.undo()
    assert not is_dead(hidden)


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = replace(this_process(), pid=child.pid, started=_start_of(child.pid) or "")
    assert owner.started.isdigit()
    assert not is_dead(owner)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(owner)
    child.communicate()
    assert is_dead(owner)


def test_renewal_keeps_a_short_lease(local: Storage) -> None:
    with Lease.acquire(local, RUN, ttl_s=1.2) as lease:
        for _ in range(8):
            time.sleep(0.2)
            record = read_record(local, RUN)
            assert record is not None
            assert is_live(record)
        lease.check()
        with pytest.raises(LeaseHeldError):
            Lease.acquire(local, RUN)


def test_paused_driver_publishes_nothing_after_a_takeover(storage: Storage, drivers: list[Driver]) -> None:
    old = Driver(storage, 2.0)
    drivers.append(old)
    assert old.says() == "taken 1"
    old.ask("before")
    assert old.says() == "done"
    old.process.send_signal(signal.SIGSTOP)
    old.ask("after")
    old.ask("check")
    with pytest.raises(LeaseHeldError):
        Lease.acquire(storage, RUN)
    time.sleep(2.1)
    with Lease.acquire(storage, RUN) as lease:
        publish(storage, lease.token, "mine", {"by": 2})
        old.process.send_signal(signal.SIGCONT)
        for _ in range(2):
            assert "LeaseLostError epoch 1" in (said := old.says())
            assert f"process {os.getpid()} took over with epoch 2" in said
        lease.check()
        assert read_published(storage, RUN) == {"before": {"by": 1}, "mine": {"by": 2}}


def test_paused_driver_that_nobody_replaced_goes_on(local: Storage, drivers: list[Driver]) -> None:
    driver = Driver(local, 1.0)
    drivers.append(driver)
    assert driver.says() == "taken 1"
    driver.process.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    driver.ask("check")
    driver.ask("late")
    driver.process.send_signal(signal.SIGCONT)
    assert [driver.says(), driver.says()] == ["done", "done"]
    assert read_published(local, RUN) == {"late": {"by": 1}}


class Interrupted(LocalStorage):
    """Lets something else happen between a publisher's last look at the record and its write."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.between = lambda: None

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        between, self.between = self.between, lambda: None
        between()
        return super().put_if(key, data, version)


def test_takeover_between_look_and_write(tmp_path: Path, local: Storage) -> None:
    paused = Interrupted(str(tmp_path))
    lease = Lease.acquire(paused, RUN)
    paused.between = lambda: write_record(local, elsewhere(), seconds_left=60)
    with pytest.raises(LeaseLostError, match="far-host, process 4711 took over with epoch 7"):
        publish(paused, lease.token, "checkpoint/step-2", {"key": "c"})
    assert read_published(local, RUN) == {}
    lease.release()
    record = read_record(local, RUN)
    assert record is not None
    assert record.owner == elsewhere()
    assert is_live(record)


def test_renewal_that_meets_a_takeover_marks_the_lease_lost(local: Storage) -> None:
    with Lease.acquire(local, RUN, ttl_s=0.3) as lease:
        write_record(local, elsewhere(), seconds_left=60)
        time.sleep(0.4)
        with pytest.raises(LeaseLostError, match="far-host"):
            lease.check()


class Away(LocalStorage):
    """A store that can be switched off."""

    away = False

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        if self.away:
            raise StorageError("the store is away")
        return super().get_versioned(key)


def test_store_that_is_away_for_a_while(tmp_path: Path) -> None:
    storage = Away(str(tmp_path))
    with Lease.acquire(storage, RUN, ttl_s=1.5) as lease:
        storage.away = True
        time.sleep(0.7)
        lease.check()  # a renewal has failed, the lease is still good
        time.sleep(1.0)
        with pytest.raises(LeaseLostError, match=r"ran out .* s ago.*the store is away"):
            lease.check()
        storage.away = False
        lease.check()  # nobody took it: it goes on
        publish(storage, lease.token, "x", {})


def test_publishing_workers_and_the_renewal_do_not_lose_each_other(local: Storage) -> None:
    with Lease.acquire(local, RUN, ttl_s=0.1) as lease, ThreadPoolExecutor(8) as pool:
        token = pickle.loads(pickle.dumps(lease.token))
        list(pool.map(lambda i: publish(local, token, f"n{i}", {"i": i}), range(64)))
        lease.check()
        assert read_published(local, RUN) == {f"n{i}": {"i": i} for i in range(64)}


def test_lost_record_and_damaged_record(local: Storage) -> None:
    with Lease.acquire(local, RUN) as lease:
        local.delete(f"{RUN}/lease.json")
        with pytest.raises(LeaseLostError, match="record is gone"):
            publish(local, lease.token, "x", {})
    local.put(f"{RUN}/lease.json", b'{"epoch": 1')
    with pytest.raises(IntegrityError, match=r"11 bytes.*no lease record"):
        read_record(local, RUN)
