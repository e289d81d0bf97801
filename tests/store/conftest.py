"""What the tests of places share: an S3 server, a bucket for each test, and a local store to hold others against."""

import http.client
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import pytest

import layerprobe as lp
from elsewhere import OPTIONS, PATIENCE, SECRET
from layerprobe.models import LoadedModel
from layerprobe.store.remote import RemotePlace
from servers import Spoiler, serve_s3

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failure what the S3 server was asked: what fails once in many runs is seen once."""
    report = yield
    spoiler = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(spoiler, Spoiler):
        report.sections.append((f"S3 requests {report.when}", spoiler.describe_latest()))
    return report


@pytest.fixture
def bucket(server: Spoiler) -> str:
    """The URL of a new bucket."""
    name = f"bucket-{next(_numbers)}"
    connection = http.client.HTTPConnection("127.0.0.1", server.upstream)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    return f"s3://{name}"


@pytest.fixture
def place(bucket: str) -> RemotePlace:
    return RemotePlace(f"{bucket}/deep/acts", PATIENCE)


@pytest.fixture(scope="module")
def plain_texts() -> list[str]:
    """Twelve plain_texts of different lengths, one empty, one too long."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "."]
    return [*(" ".join(words[: 1 + 3 * number % 10]) for number in range(10)), "", "the " * 200]


@pytest.fixture(scope="module")
def local(tiny: LoadedModel, plain_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The store in a folder that those elsewhere are held against."""
    return lp.extract(tiny, plain_texts, tmp_path_factory.mktemp("local") / "acts", **OPTIONS)
