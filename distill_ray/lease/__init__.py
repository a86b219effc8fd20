"""One writer per run: a lease with an epoch, whose record is also the run's only commit log.

`lease.json` names the owner, the epoch, the expiry and everything that the run has published. Publishing is a
compare-and-swap on that very record, so a driver that wakes up after a takeover can publish nothing: there is no
moment between "am I still the owner?" and "write". Anything that the record does not name does not exist.
"""

from distill_ray.lease.artefact import (
    document_entry,
    file_sha256,
    folder_of,
    problems_of,
    read_document,
    read_whole_folder,
    store_folder,
)
from distill_ray.lease.hold import Lease
from distill_ray.lease.owner import Owner, is_dead, this_process
from distill_ray.lease.record import (
    LeaseRecord,
    LeaseToken,
    is_live,
    lease_written_at,
    publish,
    put_owned,
    read_published,
    read_record,
    require_owned,
)

__all__ = [
    "Lease",
    "LeaseRecord",
    "LeaseToken",
    "Owner",
    "document_entry",
    "file_sha256",
    "folder_of",
    "is_dead",
    "is_live",
    "lease_written_at",
    "problems_of",
    "publish",
    "put_owned",
    "read_document",
    "read_published",
    "read_record",
    "read_whole_folder",
    "require_owned",
    "store_folder",
    "this_process",
]
