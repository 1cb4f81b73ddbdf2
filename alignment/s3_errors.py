"""S3's errors as messages: name, cause and remedy, never a key. Matched by S3's codes and botocore's classes."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from alignment.errors import AlignmentError, StorageConflict, StorageError
from alignment.s3_connection import ATTEMPTS, endpoint

_USER = re.compile(r"://[^/@\s]*@")
"""A user's name and password in an address."""
_ABSENT = {"404", "NoSuchKey"}
_KEYS = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and that they belong to the server behind "
    "AWS_ENDPOINT_URL"
)
_EXPIRED = "log in anew (`aws sso login`) or take fresh temporary keys, AWS_SESSION_TOKEN included"
_CODES = {
    "InvalidAccessKeyId": ("the access key is not known there", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", _KEYS),
    "AccessDenied": ("access denied", "let these keys do it in the bucket's policy, or use others"),
    "AllAccessDisabled": ("access denied", "let these keys do it in the bucket's policy, or use others"),
    "403": ("access denied", f"{_KEYS}, and that the bucket's policy lets them do it"),
    "ExpiredToken": ("the session token has expired", _EXPIRED),
    "InvalidToken": ("the session token is not valid", _EXPIRED),
    "RequestTimeTooSkewed": ("this machine's clock differs too much from the server's", "set it right (NTP)"),
    "RequestExpired": ("this machine's clock differs too much from the server's", "set it right (NTP)"),
    "NoSuchBucket": ("there is no such bucket", "create it (`aws s3 mb`), or correct its name or AWS_ENDPOINT_URL"),
    "NoSuchKey": ("there is no such object", "check the name"),
    "404": ("there is no such bucket or object", "check the name and AWS_ENDPOINT_URL"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's"),
    "301": ("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's"),
    "QuotaExceeded": ("the quota is used up", "delete what is not needed, or ask for a higher quota"),
    "BadDigest": ("what arrived was not what was sent, or the file changed meanwhile", "try again"),
    "SlowDown": ("the server is overloaded", "try again later"),
}


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns boto3's errors in the body into a StorageError: the name, the cause, the remedy, never a key.

    A condition that did not hold (412, and 409 while another writes) is a StorageConflict.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        raise _refusal(uri, error) from error
    except BotoCoreError as error:
        inner = error.kwargs.get("error") if hasattr(error, "kwargs") else None
        if isinstance(inner, AlignmentError):  # of the file that was being sent
            raise inner from error
        raise StorageError(f"{uri}: {_failure(error)}") from error
    except ResponseParserError as error:
        raise StorageError(
            f"{uri}: the answer is not S3's, or was cut off ({endpoint()}); try again, or check AWS_ENDPOINT_URL"
        ) from error


def error_code(error: Any) -> str:
    """S3's code of a ClientError; a HEAD has no body, so that its code is the status, as in "404"."""
    return str(error.response.get("Error", {}).get("Code", ""))


def error_status(error: Any) -> int:
    """The HTTP status of a ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_broken_connection(error: BaseException) -> bool:
    """Whether there is no connection, or it broke or stalled, so that trying again may help."""
    from botocore import exceptions as known

    broken = known.HTTPClientError | known.ConnectionError | known.IncompleteReadError
    return isinstance(error, broken) and not isinstance(error, known.SSLError)


def is_absent(error: Any) -> bool:
    """Whether a ClientError says that the object is not there. (For a HEAD that may also mean the bucket.)"""
    return error_code(error) in _ABSENT


def without_user(text: str) -> str:
    """A text in which addresses have no user's name and password."""
    return _USER.sub("://", text)


def _refusal(uri: str, error: Any) -> StorageError:
    code, status, operation = error_code(error), error_status(error), error.operation_name
    if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
        return StorageConflict(f"{uri}: written by somebody else meanwhile ({operation} → {status}); read it again")
    if code in _CODES:
        cause, remedy = _CODES[code]
    elif status >= 500 or status == 429:
        tries = error.response["ResponseMetadata"].get("RetryAttempts", 0) + 1
        cause, remedy = f"the server failed {tries} times in a row", "see its logs and try again later"
    else:
        cause, remedy = "refused", "check AWS_ENDPOINT_URL and the bucket's settings"
    return StorageError(f"{uri}: {cause} ({operation} → {status} {code} at {endpoint()}); {remedy}")


def _failure(error: Any) -> str:
    """Cause and remedy of an error that is no answer of the server's. Matched by botocore's class."""
    from botocore import exceptions as known

    retry = f"tried {ATTEMPTS} times; check AWS_ENDPOINT_URL, the network and proxies, then try again"
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
        return "no keys, or half of them, were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, known.ProfileNotFound):
        return "AWS_PROFILE names a profile that is not in ~/.aws/config; correct it"
    if isinstance(error, known.CredentialRetrievalError | known.SSOError):
        return f"the keys could not be fetched ({type(error).__name__}); {_EXPIRED}"
    if isinstance(error, known.SSLError):
        return f"no trusted TLS connection to {endpoint()}; name the server's certificate in AWS_CA_BUNDLE"
    if isinstance(error, known.ConnectTimeoutError | known.ReadTimeoutError):
        return f"{endpoint()} did not answer in time; {retry}"
    if is_broken_connection(error):
        return f"no connection to {endpoint()}, or it broke ({type(error).__name__}); {retry}"
    return f"{type(error).__name__}: {without_user(str(error))}; check the AWS_* environment and ~/.aws/config"
