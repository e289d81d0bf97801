"""Threads that were left with a request under way are waited for before their place is written again."""

import threading

from layerprobe.store.abandoned import abandon, wait_for_abandoned


def test_a_place_is_waited_for_until_what_was_left_there_has_ended() -> None:
    answered = threading.Event()
    left = threading.Thread(target=answered.wait, daemon=True)
    left.start()
    abandon("s3://bucket/acts", left)
    wait_for_abandoned("s3://bucket/other")
    # two who begin there at once
    waiting = [threading.Thread(target=wait_for_abandoned, args=("s3://bucket/acts",), daemon=True) for _ in range(2)]
    for one in waiting:
        one.start()
    waiting[0].join(0.2)
    assert all(one.is_alive() for one in waiting)
    answered.set()
    for one in (*waiting, left):
        one.join(60)
        assert not one.is_alive()
    wait_for_abandoned("s3://bucket/acts")
