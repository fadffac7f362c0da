"""An S3 server on this machine for tests, and the environment that points every client at it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ipvg_ray import s3_client, storage


@contextmanager
def s3_server(environment: pytest.MonkeyPatch, bucket: str = "runs") -> Iterator[str]:
    """Start moto's server with one bucket, seen by this process and those it starts; yields the endpoint."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        environment.setenv(name, value)
    clear()
    storage.S3Path(bucket)._call("create_bucket")
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
        clear()


def clear() -> None:
    """Forget clients of an earlier server."""
    s3_client.client.cache_clear()
    s3_client.arrow.cache_clear()
