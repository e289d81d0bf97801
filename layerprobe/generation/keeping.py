"""Save and load narrow decoders: weights as safetensors, description and scores as JSON.

`decoders.safetensors` holds the parameters of each site under `site:parameter`, `decoders.json` the rest. An untrusted
folder is read within bounds and no code in it is run; a network is built only if its sizes match those of the tensors.

Must never know of stores.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.errors import FormatError, StoreError, telling_refusals
from layerprobe.generation.narrow import NUM_RESERVED, DecoderShape, NarrowDecoder
from layerprobe.store.format import check_keepable
from layerprobe.store.guard import SMALL, brief, exists_inside, need_path, parse_json, read_inside

__all__ = ["is_kept", "read_decoders", "write_decoders"]

_FORMAT = "layerprobe-decoders/1"
_SAID, _TENSORS = "decoders.json", "decoders.safetensors"
# Enough for 64 layers of the default shape with twice its vocabulary.
_MOST_BYTES = 1 << 30


def write_decoders(folder: str | Path, decoders: Mapping[str, NarrowDecoder], said: Mapping[str, Any]) -> Path:
    """Write decoders into a folder, which is created if needed; existing files of these names are replaced.

    Args:
        folder: The folder.
        decoders: Decoders by site, all with the same shape and vocabulary.
        said: Further entries of `decoders.json`, as JSON values.

    Raises:
        StoreError: the folder cannot be written.
        OptionError: the folder is that of a store.
    """
    from safetensors.torch import save_file

    folder = need_path("folder", folder)
    check_keepable(folder)
    first = next(iter(decoders.values()))
    own = {"format": _FORMAT, "sites": list(decoders), "shape": asdict(first.shape), "types": list(first.types)}
    tensors = {
        f"{site}:{name}": tensor.detach().cpu().contiguous()
        for site, decoder in decoders.items()
        for name, tensor in _list_tensors(decoder).items()
    }
    with telling_refusals(folder, "written", "Choose another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _TENSORS)
        (folder / _SAID).write_text(json.dumps({**own, **said}, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def is_kept(folder: str | Path) -> bool:
    """Return whether a folder holds decoders."""
    return Path(folder).is_dir() and exists_inside(Path(folder), _SAID)


def read_decoders(folder: str | Path) -> tuple[dict[str, NarrowDecoder], dict[str, Any]]:
    """Read what `write_decoders` wrote; return the decoders by site, and the contents of `decoders.json`.

    Raises:
        StoreError: there are none.
        FormatError: they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = need_path("folder", folder)
    if not is_kept(folder) or not exists_inside(folder, _TENSORS):
        raise StoreError(f"no decoders in {folder}: it has no {_SAID} and {_TENSORS}. Keep some with save().")
    try:
        said = parse_json(read_inside(folder, _SAID, SMALL.num_bytes), SMALL)
        if said["format"] != _FORMAT:
            raise ValueError(f"format {said['format']!r} is not {_FORMAT!r}")
        shape = DecoderShape(**{name: int(value) for name, value in said["shape"].items()})
        types = [int(token) for token in said["types"]]
        tensors = load(read_inside(folder, _TENSORS, _MOST_BYTES))
        decoders = {site: _build(site, tensors, types, shape) for site in map(str, said["sites"])}
        if not decoders or sum(len(_list_tensors(one)) for one in decoders.values()) != len(tensors):
            raise ValueError(f"{len(tensors)} tensors are not those of {len(decoders)} sites")
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise FormatError(f"{folder}: holds no whole decoders ({brief(error)}). Keep them again.") from error
    return decoders, said


def _build(site: str, tensors: Mapping[str, Tensor], types: list[int], shape: DecoderShape) -> NarrowDecoder:
    own = {name.removeprefix(f"{site}:"): tensor for name, tensor in tensors.items() if name.startswith(f"{site}:")}
    embedded, places = own["language.bert.embeddings.word_embeddings.weight"], "position_embeddings.weight"
    sizes = {
        "width": (shape.width, embedded.shape[1]),
        "types": (len(types), embedded.shape[0] - NUM_RESERVED),
        "max_length": (shape.max_length, len(own[f"language.bert.embeddings.{places}"]) - 1),
    }
    # check sizes before building a network from numbers in an untrusted file
    differing = [f"{name} {here}, tensors of {there}" for name, (here, there) in sizes.items() if here != there]
    if differing or not 0 < shape.num_layers <= len(own) or not 0 < shape.num_heads <= shape.width:
        raise ValueError("; ".join(differing) or f"{shape.num_layers} layers, {shape.num_heads} heads")
    with torch.random.fork_rng():
        decoder = NarrowDecoder(types, len(own["mean"]), shape)
    wanted = _list_tensors(decoder)
    if set(wanted) != set(own):
        raise ValueError(f"{site}: {brief(sorted(set(wanted) ^ set(own))[0])} is missing or too many")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                raise ValueError(f"{site}: {brief(name)} is {own[name].dtype} {list(own[name].shape)}")
            tensor.copy_(own[name])
    return decoder.eval()


def _list_tensors(decoder: NarrowDecoder) -> dict[str, Tensor]:
    """Return a decoder's parameters and buffers by name; tied parameters appear once."""
    return {**dict(decoder.named_parameters()), "mean": decoder.mean, "scale": decoder.scale}
