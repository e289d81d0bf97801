"""Save and load a probe: weights, classes, and how its vectors are made, as safetensors and JSON.

`probe.safetensors` holds weights and bias, `probe.json` the rest. An untrusted folder is read within bounds and
no code in it is run.

Must never know of models; `layerprobe.load_classifier` goes from text to classes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.analysis.features import Feature
from layerprobe.analysis.probing import LinearProbe
from layerprobe.errors import FormatError, StoreError, telling_refusals
from layerprobe.store.format import check_keepable
from layerprobe.store.guard import SMALL, brief, exists_inside, need_path, parse_json, read_inside

__all__ = ["KeptProbe", "load_probe"]

_FORMAT = "layerprobe-probe/1"
_SAID, _ARRAYS = "probe.json", "probe.safetensors"
# Enough for thousands of classes on the joined layers of a large model.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class KeptProbe:
    """A classifier of vectors, with the information needed to make them.

    Args:
        linear: The weights.
        feature: The sites, and how they become one vector.
        classes: The labels, by number.
        kind: `examples`, `tokens` or `spans`.
        pool: How an example's rows become one vector; None for tokens and spans.
        max_length: Maximum length of a text in tokens; None for the model's limit.
        model: The store's description of the model.
    """

    linear: LinearProbe
    feature: Feature
    classes: tuple[Any, ...]
    kind: str
    pool: str | None
    max_length: int | None
    model: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write the probe into a folder, which is created if needed; existing files of these names are replaced.

        Raises:
            StoreError: the folder cannot be written.
            OptionError: the folder is that of a store.
        """
        from safetensors.numpy import save_file

        folder = need_path("folder", folder)
        check_keepable(folder)
        said = {
            "format": _FORMAT,
            "feature": asdict(self.feature),
            "classes": list(self.classes),
            "kind": self.kind,
            "pool": self.pool,
            "max_length": self.max_length,
            "model": self.model,
        }
        with telling_refusals(folder, "written", "Choose another folder."):
            folder.mkdir(parents=True, exist_ok=True)
            arrays = {"weights": self.linear.weights, "bias": self.linear.bias}
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / _ARRAYS)
            (folder / _SAID).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder


def load_probe(folder: str | Path) -> KeptProbe:
    """Load a probe that `save` wrote.

    Raises:
        StoreError: there is none.
        FormatError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = need_path("folder", folder)
    if not all(exists_inside(folder, file) for file in (_SAID, _ARRAYS)):
        raise StoreError(f"no classifier in {folder}: it has no {_SAID} and {_ARRAYS}. Keep one with probe.save().")
    try:
        said = parse_json(read_inside(folder, _SAID, SMALL.num_bytes), SMALL)
        arrays = load(read_inside(folder, _ARRAYS, _MOST_BYTES))
        if said["format"] != _FORMAT:
            raise ValueError(f"format {said['format']!r} is not {_FORMAT!r}")
        feature = said["feature"]
        factors = feature["factors"]
        probe = KeptProbe(
            LinearProbe(arrays["weights"], arrays["bias"]),
            Feature(
                str(feature["name"]),
                tuple(map(str, feature["sites"])),
                None if factors is None else tuple(map(float, factors)),
            ),
            tuple(said["classes"]),
            str(said["kind"]),
            said["pool"],
            said["max_length"],
            dict(said["model"]),
        )
        shape = probe.linear.weights.shape
        if len(shape) != 2 or probe.linear.bias.shape != shape[:1] or len(probe.classes) != shape[0]:
            raise ValueError(f"{len(probe.classes)} classes, weights {list(shape)}")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FormatError(f"{folder}: is not a whole classifier ({brief(error)}). Keep it again.") from error
    return probe
