"""Stores on an S3 server that is ill: faults are lived through, or named with the URL and without a secret."""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from elsewhere import OPTIONS, PATIENCE, SECOND, SECRET, SHORT, contents, copy_store
from layerprobe.errors import FormatError, LayerProbeError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store.abandoned import wait_for_abandoned
from layerprobe.store.remote import RemotePlace
from layerprobe.store.writer import ShardWriter
from servers import Spoiler

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "503", "cut", "reset", "stall"])
def test_a_fault_of_reading_is_lived_through(fault: str, local: Any, place: RemotePlace, server: Spoiler) -> None:
    copy_store(local, place)
    store = lp.open(RemotePlace(place.url, SHORT))
    server.clear()
    server.spoil(fault)
    found = store["layers.1"][4]
    assert torch.equal(found, local["layers.1"][4])
    assert not server.faults
    server.spoil(fault)
    assert torch.equal(store["layers.2"].pooled(), local["layers.2"].pooled())
    assert not server.faults


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "503", "reset", "stall"])
def test_a_fault_of_writing_is_lived_through(
    fault: str, tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, server: Spoiler, local: Any
) -> None:
    server.clear()
    server.spoil(fault, "503", method="PUT")
    lp.extract(tiny, plain_texts, RemotePlace(place.url, SHORT), **OPTIONS)
    assert not server.faults
    assert contents(place) == contents(local.place)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [("503", "Please try again"), ("cut", "not completed|bytes came"), ("reset", "disconnected|closed|reset")],
)
def test_a_server_that_stays_ill_is_an_error_that_names_the_object(
    fault: str, cause: str, local: Any, place: RemotePlace, server: Spoiler
) -> None:
    copy_store(local, place)
    store = lp.open(place)
    server.clear()
    # more than attempts: below, a connection that was reset is made anew without a word
    server.spoil(*[fault] * 3 * PATIENCE.attempts)
    message = rf"s3://.*/acts/shard-000000\.safetensors: cannot be read \(.*({cause}).*after 4 attempts\)"
    with pytest.raises(StoreError, match=message) as caught:
        store["layers.1"][0]
    assert caught.value.__cause__ is not None and not isinstance(caught.value, FormatError)
    server.faults.clear()
    # what failed is asked for again
    assert torch.equal(store["layers.1"][0], local["layers.1"][0])
    # both shards to come are asked for at once, and the first of them again when it is needed
    server.spoil(*[fault] * 12 * PATIENCE.attempts)
    with pytest.raises(StoreError, match="after 4 attempts"):
        store["layers.1"].pooled()
    server.faults.clear()
    assert torch.equal(store["layers.1"][1], local["layers.1"][1])
    assert torch.equal(store["layers.1"].pooled(), local["layers.1"].pooled())


def lose_second(tiny: LoadedModel, texts: list[str], place: RemotePlace, server: Spoiler) -> None:
    """Leave a run that lacks its second shard, with nothing asked of the server yet."""
    lp.extract(tiny, texts, place, **OPTIONS)
    for file in ("index.json", SECOND):
        place.remove(file)
    server.clear()


def test_a_server_that_takes_no_shard_stops_the_run_which_can_go_on(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, server: Spoiler, local: Any
) -> None:
    lose_second(tiny, plain_texts, place, server)
    server.spoil(*["500"] * PATIENCE.attempts, method="PUT")
    with pytest.raises(StoreError, match=rf"/acts/{SECOND}: cannot be written .*What was committed before stays"):
        lp.extract(tiny, plain_texts, place, **OPTIONS)
    assert not place.exists("index.json")
    lp.extract(tiny, plain_texts, place, **OPTIONS)
    assert contents(place) == contents(local.place)


def test_ctrl_c_ends_a_run_whose_shard_is_not_answered_and_no_request_follows(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, server: Spoiler, local: Any
) -> None:
    lose_second(tiny, plain_texts, place, server)
    server.spoil("stall", *["reset"] * 20, method="PUT", path=f"/{SECOND}")
    own = threading.get_ident()

    def interrupt() -> None:
        # once the request is made, and the writer's end waited for
        while len(server.faults) > 20 or sys._current_frames()[own].f_code is not ShardWriter.close.__code__:
            time.sleep(0.01)
        signal.pthread_kill(own, signal.SIGINT)

    pressing = threading.Thread(target=interrupt)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        lp.extract(tiny, plain_texts, place, **OPTIONS)
    pressing.join()
    [writer] = [thread for thread in threading.enumerate() if thread.name == "layerprobe-writer"]
    assert not server.count("PUT"), "it waited for the answer"
    threading.Timer(0.3, server.stop_stalling).start()
    # what begins there next waits for the answer, which would come on top of its own
    wait_for_abandoned(str(place))
    assert not writer.is_alive()
    # below, a connection that was reset is made anew without a word
    assert len(server.faults) >= 19
    server.clear()
    lp.extract(tiny, plain_texts, place, **OPTIONS)
    assert contents(place) == contents(local.place)


def test_a_server_that_does_not_answer_makes_no_shard_a_damaged_one(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, server: Spoiler, local: Any
) -> None:
    copy_store(local, place)
    server.clear()
    # the size of store.json is told, that of no shard
    server.spoil(*["500"] * 200, method="HEAD", path="/shard-")
    with pytest.raises(StoreError, match=r"/shard-\d+\.safetensors: cannot be read .*after 4 attempts"):
        lp.extract(tiny, plain_texts, place, **OPTIONS)
    assert server.count("PUT") == 0


def test_no_message_tells_a_secret(
    tiny: LoadedModel, plain_texts: list[str], place: RemotePlace, server: Spoiler, local: Any
) -> None:
    copy_store(local, place)
    messages = []
    for faults in (["503"] * 99, ["cut"] * 99, ["reset"] * 99):
        server.spoil(*faults)
        with pytest.raises(LayerProbeError) as caught:
            lp.open(place)
        messages.append(str(caught.value))
        server.clear()
    with pytest.raises(StoreError) as caught:
        RemotePlace("s3://no-such-bucket/acts", PATIENCE).commit("x", [b"1"])
    messages += [str(caught.value), repr(place.__dict__), str(place)]
    assert not [message for message in messages if SECRET in message]
