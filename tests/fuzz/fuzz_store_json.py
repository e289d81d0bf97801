"""Fuzz `store.json` and `index.json`: whatever they hold, a store that can be described or a refusal.

The input is one file, then a line of three hashes, then the other; without that line there is no index. The folder
holds no shards, as a stranger's may.

Run as `fuzz/__main__.py` says. Must never know who mutates.
"""

import contextlib
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

from layerprobe.cli.views import describe_store
from layerprobe.errors import LayerProbeError
from layerprobe.store.reader import open_store
from layerprobe.store.siteview import SiteView

__all__ = ["SEPARATOR", "check_store_json"]

SEPARATOR = b"\n###\n"


def check_store_json(data: bytes) -> None:
    """Open one store without shards; an error that is none of layerprobe's is a bug."""
    description, found, index = data.partition(SEPARATOR)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        (Path(folder) / "store.json").write_bytes(description)
        if found:
            (Path(folder) / "index.json").write_bytes(index)
        try:
            store = open_store(folder)
        except LayerProbeError:
            return
        assert store.is_complete is bool(found)
        assert len(store) >= 0 and store.num_tokens >= 0
        assert len(list(itertools.islice(store.ordinals(), 5))) == min(5, len(store))
        assert all(site.isprintable() and 0 <= store[site].width < 2**31 for site in store.sites)
        assert describe_store(store)
        for view in (store[site] for site in itertools.islice(store.sites, 3)):
            for read in (partial(view.__getitem__, 0), view.pooled, partial(_read_rows, view)):
                with contextlib.suppress(LayerProbeError):
                    read()


def _read_rows(view: SiteView) -> None:
    for _ in view.rows():
        pass
