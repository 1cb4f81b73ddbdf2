"""Uploads in parts that were begun and not completed: their parts are paid for until they are completed or aborted."""

from alignment.s3 import Location, object_location
from alignment.s3_connection import s3_client
from alignment.s3_errors import error_code, explained


def unfinished_uploads(location: Location) -> list[tuple[str, str]]:
    """Key and id of the unfinished uploads whose key begins like a location's."""
    pages = s3_client().get_paginator("list_multipart_uploads").paginate(Bucket=location.bucket, Prefix=location.key)
    return [(upload["Key"], upload["UploadId"]) for page in pages for upload in page.get("Uploads", [])]


def abort_upload(location: Location, upload_id: str) -> None:
    """End an unfinished upload and free its parts; one that is gone is no error."""
    from botocore.exceptions import ClientError

    try:
        s3_client().abort_multipart_upload(Bucket=location.bucket, Key=location.key, UploadId=upload_id)
    except ClientError as error:
        if error_code(error) != "NoSuchUpload":
            raise


def abort_uploads(uri: str) -> None:
    """End all unfinished uploads below a folder. Raises StorageError."""
    folder = object_location(uri)
    with explained(uri):
        for key, upload_id in unfinished_uploads(Location(folder.bucket, f"{folder.key}/")):
            abort_upload(Location(folder.bucket, key), upload_id)
