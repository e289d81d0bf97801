"""What the tests of places share: an S3 server of their own, with a bucket for each test."""

import http.client
import itertools
from collections.abc import Iterator

import pytest

from layerprobe.store.remote import Patience
from servers import Spoiler, serve_s3

# Of a key that is never to be seen in a message.
SECRET = "not-for-any-eyes"
# Long enough for a busy machine; what does stall does so until it is released.
PATIENCE = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=2)

_numbers = itertools.count()


@pytest.fixture(scope="session")
def _server() -> Iterator[Spoiler]:
    with serve_s3() as spoiler:
        yield spoiler


@pytest.fixture
def server(_server: Spoiler, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spoiler]:
    """The proxy before the S3 server, its log empty; the environment leads to it."""
    for name, value in {
        "AWS_ENDPOINT_URL": _server.url,
        "AWS_ACCESS_KEY_ID": "layerprobe",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    _server.clear()
    yield _server
    _server.stop_stalling()


@pytest.fixture
def bucket(server: Spoiler) -> str:
    """The URL of a new bucket."""
    name = f"bucket-{next(_numbers)}"
    connection = http.client.HTTPConnection("127.0.0.1", server.upstream)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    return f"s3://{name}"
