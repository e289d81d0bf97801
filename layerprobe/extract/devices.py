"""The devices of a run on several of them: one process each, with units shared among them.

The processes share no memory and get their job as JSON through a pipe, so the model must be given by name, and texts
that are not in a file are written to one first. Everything is checked before any process starts.

Must never know of processes.
"""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerprobe.errors import OptionError
from layerprobe.extract.inputs import HUB_PREFIX, TextSource, open_source
from layerprobe.extract.records import Record

__all__ = ["Crew", "gather_crew", "name_devices"]


@dataclass(frozen=True, eq=False)
class Crew:
    """The devices of a run, and what each process loads.

    Args:
        devices: One process each; a device may be named more than once.
        model: Name of the model that each process loads.
        texts: A path, or the name of a data set, that each process reads.
    """

    devices: tuple[str, ...]
    model: str
    texts: str


def name_devices(devices: str | Sequence[int | str]) -> tuple[str, ...]:
    """Name devices as torch does: `"0,1"` and `[0, 1]` are `cuda:0` and `cuda:1`.

    Raises:
        OptionError: there is no such device here.
    """
    if not devices or not isinstance(devices, (str, list, tuple)):
        raise OptionError(f"devices={devices!r}: names no device. Use a list such as [0, 1], or '0,1'.")
    given = devices.split(",") if isinstance(devices, str) else [str(device) for device in devices]
    names = tuple(f"cuda:{name.strip()}" if name.strip().isdigit() else name.strip() for name in given)
    count = torch.cuda.device_count()
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        is_there = device is not None and (device.type != "cuda" or (device.index or 0) < count)
        if not is_there or name == "meta":
            raise OptionError(
                f"devices={','.join(map(str, given))!r}: no device {name!r} here; there are {count} CUDA devices. "
                "Use numbers, such as 0,1, or cpu,cpu."
            )
    if len({torch.device(name).type for name in names}) > 1:
        raise OptionError(
            f"devices={','.join(names)}: they are of different kinds, whose rows differ in their last digits. "
            "Use devices of one kind."
        )
    return names


def gather_crew(
    devices: tuple[str, ...], model: object, texts: Any, to: object, field: str, untold: Mapping[str, bool]
) -> tuple[Crew, TextSource]:
    """Put the model and texts of a run into a form that several processes can load.

    Args:
        devices: From `name_devices`.
        model, texts, to, field: As for `extract`.
        untold: For each option that cannot be sent to another process, whether it was given.

    Raises:
        OptionError: some argument of the run cannot be sent to another process.
    """
    asked = f"devices={','.join(devices)}"
    if os.name == "nt":
        raise OptionError(f"{asked}: pipes that processes inherit are not built for Windows. Use device.")
    if not isinstance(model, str):
        raise OptionError(f"{asked} with a {type(model).__name__}: each process loads its own. Give the model's name.")
    if not isinstance(to, (str, Path)) or str(to).startswith("memory:"):
        raise OptionError(f"{asked} into {to}: another process cannot write there. Use a folder, or another URL.")
    for name, is_given in untold.items():
        if is_given:
            raise OptionError(f"{asked} with this {name}: it cannot be told to another process. Leave one of them out.")
    source = open_source(texts, field)
    if isinstance(texts, (str, Path)) and str(texts) != "-":
        is_file = not str(texts).startswith(HUB_PREFIX)
        return Crew(devices, model, str(Path(texts).absolute() if is_file else texts)), source
    path = Path(tempfile.mkdtemp(prefix="layerprobe-texts-")) / "texts.jsonl"
    crew = Crew(devices, model, str(path))
    weakref.finalize(crew, shutil.rmtree, path.parent, ignore_errors=True)
    with open(path, "w", encoding="ascii") as file:
        for record in source:
            file.write(json.dumps({**record.fields, field: record.text}) + "\n")
    return crew, TextSource(source.name, lambda: _read(path, field))


def _read(path: Path, field: str) -> Iterator[Record]:
    return iter(open_source(path, field))
