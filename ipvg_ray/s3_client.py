"""Connections to object stores: one client per process, with the retries and time limits that runs want."""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

ATTEMPTS = 8
"""Tries of one request, with growing pauses between them; about a minute of 503s is ridden out."""
TIMEOUTS = {False: (10, 60), True: (3, 5)}
"""Seconds to connect and to wait for bytes, of patient and of hasty requests."""
PIECE = 16 << 20
"""Bytes of one part of a large object; parts are sent and fetched eight at a time, each tried again by itself."""


def transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=PIECE, multipart_chunksize=PIECE, max_concurrency=8, num_download_attempts=ATTEMPTS
    )


def forget_credentials() -> None:
    """Look for credentials anew: a file of them may have been renewed since they were read."""
    client.cache_clear()
    arrow.cache_clear()


@lru_cache
def client(process: int, hasty: bool = False) -> Any:
    """One client per process: its connections must not be shared with a fork."""
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 2 if hasty else ATTEMPTS}
    seconds = TIMEOUTS[hasty]
    config = Config(
        retries=retries,
        connect_timeout=seconds[0],
        read_timeout=seconds[1],
        max_pool_connections=32,
        signature_version="s3v4",  # else links would be signed in the old way, which newer regions refuse
    )
    return boto3.session.Session().client("s3", config=config)


@lru_cache
def arrow(process: int, bucket: str) -> pafs.S3FileSystem:
    """pyarrow's view of the same bucket, with the endpoint that boto3 found, and the region the bucket lies in."""
    boto = client(process)
    endpoint = urlsplit(boto.meta.endpoint_url)
    own = not endpoint.netloc.endswith("amazonaws.com")
    return pafs.S3FileSystem(
        region=boto.meta.region_name if own else boto.head_bucket(Bucket=bucket)["BucketRegion"],
        endpoint_override=endpoint.netloc if own else None,
        scheme=endpoint.scheme,
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )
