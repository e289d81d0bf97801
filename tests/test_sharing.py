"""Settings that several hold at once."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from layerprobe.sharing import SharedSetting


def make_setting(name: str) -> "SharedSetting[Any, Any]":
    return SharedSetting(lambda owner: getattr(owner, name), lambda owner, value: setattr(owner, name, value))


def test_last_to_leave_puts_back_what_the_first_has_found() -> None:
    lamp, other = SimpleNamespace(is_on=False), SimpleNamespace(is_on=True)
    setting = make_setting("is_on")
    first, second = setting.held(lamp), setting.held(lamp)
    assert first.__enter__() is False
    lamp.is_on = True
    assert second.__enter__() is False
    first.__exit__(None, None, None)
    assert lamp.is_on
    assert (setting.original(lamp), setting.original(other)) == (False, True)
    second.__exit__(None, None, None)
    assert not lamp.is_on
    lamp.is_on = True
    assert setting.original(lamp)


def test_setting_is_put_back_where_the_block_raises() -> None:
    lamp = SimpleNamespace(is_on=False)
    setting = make_setting("is_on")

    def fail() -> None:
        with setting.held(lamp):
            lamp.is_on = True
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not lamp.is_on


def test_owner_that_cannot_be_read_is_not_held() -> None:
    setting = make_setting("is_on")
    lamp = SimpleNamespace()
    with pytest.raises(AttributeError), setting.held(lamp):
        raise AssertionError
    lamp.is_on = True
    assert setting.original(lamp)


def test_threads_that_come_and_go_leave_it_as_it_was() -> None:
    lamp = SimpleNamespace(level=7)
    setting = make_setting("level")
    found = []

    def come_and_go(level: int) -> None:
        for _ in range(200):
            with setting.held(lamp) as original:
                lamp.level = level
                found.append(original)

    threads = [threading.Thread(target=come_and_go, args=(level,)) for level in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {7}
    assert lamp.level == 7
