"""What a forked process lets go of: each object that is alive, in the child alone."""

import os

import pytest

from layerprobe.forking import watch_forks


class Held:
    """Holds something that a fork does not have."""

    is_held = True

    def let_go(self) -> None:
        self.is_held = False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_is_alive_is_let_go_of_in_the_child_alone() -> None:
    watched = watch_forks(Held.let_go)
    kept, other, gone = Held(), Held(), Held()
    watched.update((kept, gone))
    del gone
    child = os.fork()
    if not child:
        os._exit(kept.is_held or not other.is_held or len(watched) != 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept.is_held
