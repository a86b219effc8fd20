"""What a failed S3 request means, in words that name the bucket, the endpoint and the remedy. Never a secret."""

from __future__ import annotations

import re

from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from distill_ray.errors import DistillError
from distill_ray.storage.base import NotFoundError, StorageError

# All that a request through boto3 raises. ResponseParserError, for an answer that is no XML, has no base in common with
# the others, and urllib3's own errors escape where an error's body breaks off.
S3_ERRORS = (BotoCoreError, ClientError, Boto3Error, ResponseParserError, HTTPError)

# The response broke off or did not match its checksum after the headers had come: botocore does not retry those.
BROKEN_BODY = (
    boto.ResponseStreamingError,
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.FlexibleChecksumError,
    HTTPError,
)

# A request damaged on its way, which the store noticed by its checksum or signed hash, or one that came too slowly.
_DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "RequestTimeout")
_THROTTLED = ("SlowDown", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequestsException")

_CHECKSUM = re.compile(
    "x-amz-(sdk-)?checksum|x-amz-trailer|x-amz-content-sha256|STREAMING-UNSIGNED-PAYLOAD-TRAILER|aws-chunked",
    re.IGNORECASE,
)
_NO_CHECKSUMS = (
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required wherever "
    "the run works (the driver and every node)"
)

_KEYS_REMEDY = {
    "InvalidAccessKeyId": "the access key does not exist there: check AWS_ACCESS_KEY_ID (or the profile, or role)",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: log in again, or use a role that refreshes itself",
    "ExpiredTokenException": "the session token has expired: log in again, or use a role that refreshes itself",
    "InvalidToken": "the session token is not valid: check AWS_SESSION_TOKEN or log in again",
    "RequestTimeTooSkewed": "this machine's clock is off by more than 15 minutes: set it by NTP",
    "AccessDenied": "these keys may not do that: grant s3:GetObject, s3:PutObject, s3:DeleteObject and "
    "s3:ListBucket on the bucket and prefix",
}


def explain(error: Exception, action: str, target: str, endpoint: str) -> DistillError:
    """The NotFoundError or StorageError that `error` amounts to.

    Args:
        error: one of `S3_ERRORS`.
        action: what was tried, e.g. "read"; "list" where it was the bucket that was asked.
        target: the object's `s3://` URI.
        endpoint: URL that was asked.
    """
    error = cause_of(error)
    where = f"cannot {action} {target} at {endpoint}"
    if isinstance(error, ClientError):
        if code_of(error) == "NoSuchBucket" or (status_of(error) == 404 and action == "list"):
            bucket = target.removeprefix("s3://").partition("/")[0]
            return StorageError(
                f"{where}: there is no bucket {bucket!r}; create it or correct the URI (and AWS_ENDPOINT_URL)"
            )
        return _explain_answer(error, where, target)
    return StorageError(f"{where}: {_explain_silence(error)}")


def cause_of(error: Exception) -> Exception:
    """The request's own error inside the wrapping of boto3's transfer manager, or the error itself."""
    if isinstance(error, Boto3Error):
        retried = isinstance(error, RetriesExceededError)
        inner = error.last_exception if retried else error.__cause__ or error.__context__
        if isinstance(inner, (BotoCoreError, ClientError, HTTPError)):
            return inner
    return error


def is_passing(error: Exception) -> bool:
    """Whether the very same request may succeed later: no answer, a throttled or failing server, damage on the way."""
    error = cause_of(error)
    if isinstance(error, ClientError):
        status, code = status_of(error), code_of(error)
        if code in _KEYS_REMEDY:
            return False
        return code in _DAMAGED or code in _THROTTLED or status == 429 or (status >= 500 and status not in (501, 507))
    if isinstance(error, boto.SSLError):
        return False
    return isinstance(error, (boto.ConnectionError, boto.HTTPClientError, ResponseParserError, *BROKEN_BODY))


def is_refused(error: Exception) -> bool:
    """Whether a policy refused it: for a read also a store's answer where it may not say that there is no object."""
    error = cause_of(error)
    # A HEAD's answer has no body, so no code of S3's.
    return isinstance(error, ClientError) and status_of(error) == 403 and code_of(error) in ("AccessDenied", "403")


def status_of(error: Exception) -> int:
    """HTTP status of the answer; 0 where none came."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """S3's error code; the bare status where the answer has no body (HEAD)."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _explain_answer(error: ClientError, where: str, target: str) -> DistillError:
    code, status = code_of(error), status_of(error)
    attempts = int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) + 1
    if status == 404:
        return NotFoundError(f"no such object: {target}")
    if code in _KEYS_REMEDY:
        return StorageError(f"{where}: {code} (HTTP {status}); {_KEYS_REMEDY[code]}")
    if status in (401, 403):
        return StorageError(
            f"{where}: refused with HTTP {status} ({code}); the keys are wrong or may not do that: check "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile, or role) and the bucket's policy"
        )
    if status in (301, 307, 400) and code in ("301", "307", "PermanentRedirect", "AuthorizationHeaderMalformed"):
        return StorageError(f"{where}: the bucket is in another region ({code}); set AWS_DEFAULT_REGION to it")
    if status == 507:
        return StorageError(f"{where}: the store is full ({code}, HTTP 507); free space there, then run again")
    message = error.response.get("Error", {}).get("Message", "")
    if _refuses_checksums(error):
        return StorageError(
            f"{where}: the store refuses the checksums that the AWS SDK adds by itself ({code}, HTTP {status}: "
            f"{message}); {_NO_CHECKSUMS}"
        )
    if status == 501:
        return StorageError(
            f"{where}: the store does not offer this ({code}, HTTP 501: {message}); if it means the checksums that the "
            f"AWS SDK adds by itself, {_NO_CHECKSUMS}; else use another store"
        )
    return StorageError(
        f"{where}: {code or 'error'} (HTTP {status}) after {attempts} attempts: {message}; run again when the "
        "store answers, all finished work is kept"
    )


def _refuses_checksums(error: ClientError) -> bool:
    """Whether the answer names a header of the checksums that the SDK adds to requests by itself."""
    if status_of(error) not in (400, 501) or code_of(error) in _DAMAGED:
        return False
    return any(_CHECKSUM.search(str(value)) for value in error.response.get("Error", {}).values())


def _explain_silence(error: Exception) -> str:
    if isinstance(error, boto.NoCredentialsError):
        return (
            "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run under a role"
        )
    if isinstance(error, boto.PartialCredentialsError):
        missing = error.kwargs.get("cred_var", "a part")
        return f"the credentials are incomplete, {missing} is missing; set it"
    if isinstance(error, boto.ProfileNotFound):
        return f"{error}; correct AWS_PROFILE or add the profile to the AWS configuration"
    if isinstance(error, (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError)):
        return f"the credentials could not be refreshed ({type(error).__name__}); log in again or mend the role"
    if isinstance(error, boto.SSLError):
        return "the TLS handshake failed; check the endpoint's scheme and AWS_CA_BUNDLE"
    if isinstance(error, (boto.ConnectionError, boto.HTTPClientError)):
        return (
            f"no answer ({type(error).__name__}); check that the endpoint is up and AWS_ENDPOINT_URL is right, "
            "then run again: all finished work is kept"
        )
    if isinstance(error, (ResponseParserError, *BROKEN_BODY)):
        return f"its answers arrive damaged ({type(error).__name__}: {error}); check the network, then run again"
    return f"{type(error).__name__}: {error}; check the AWS settings, then run again"
