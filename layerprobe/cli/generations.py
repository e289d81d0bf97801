"""Commands that read a layer through a decoder or the model's own head: generate, fit-decoder, lens.

They parse arguments and call the library, and compute nothing; `main` registers them.
"""

from typing import Annotated, Any

import typer

from layerprobe.cli.arguments import Device, Quiet, Seed, Table, Where
from layerprobe.cli.outcomes import check_out, conclude, refuse_given
from layerprobe.errors import OptionError

__all__ = ["fit_decoder", "generate", "lens"]


def generate(
    folder: Where,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hub id or folder of an encoder-decoder model, or of a decoder with cross attention; or a folder "
            "saved by fit-decoder.",
        ),
    ],
    layer: Annotated[
        str, typer.Option(help="Site or layer number; negative numbers count from the last stored layer.")
    ] = "-1",
    examples: Annotated[
        list[int] | None,
        typer.Option("--example", "-e", metavar="N", help="Ordinal of an example; repeatable. Default: all."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum number of tokens to generate. Default: the model's.")
    ] = None,
    beams: Annotated[int | None, typer.Option(metavar="N", help="Number of beams. Default: the model's.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the most likely token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling: sample from this share of the probability.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per batch. Default: 16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: 0.")] = None,
    device: Device = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE", help="Write a .csv or .json file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Generate text from stored states of a layer, without running the encoder.

    Example: layerprobe generate acts my-bert2bert --layer 5 --example 0 --beams 4
    """
    check_out(out, (".csv", ".json"))
    if not sample:
        drawn = {"--temperature": temperature, "--top-p": top_p}
        refuse_given(drawn, "without --sample: nothing is drawn. Add --sample.")
    from layerprobe.generation.decoding import generate as generate_from
    from layerprobe.generation.keeping import is_kept
    from layerprobe.generation.readout import load_decoder

    if is_kept(model):
        useless = {"--max-new-tokens": max_new_tokens, "--beams": beams, "--sample": sample, "--device": device}
        refuse_given(
            useless | {"--batch-size": batch_size, "--seed": seed},
            f"with {model}: its decoders write what is likeliest, up to the length that they were fitted on. "
            "Leave it out.",
        )
        found = load_decoder(model).read(folder, _read_layer(layer), examples or None)
    else:
        given = {"max_new_tokens": max_new_tokens, "num_beams": beams, "temperature": temperature, "top_p": top_p}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        found = generate_from(
            folder,
            model,
            layer=_read_layer(layer),
            examples=examples or None,
            batch_size=16 if batch_size is None else batch_size,
            seed=seed or 0,
            device=device,
            progress=False if quiet else None,
            **(options | {"do_sample": True} if sample else options),
        )
    conclude(found, out, quiet=quiet)


def fit_decoder(
    folder: Where,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="PATTERN", help="Stored sites or a layer number; repeatable. Default: all."),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Record field to decode. Default: the text.")
    ] = None,
    save: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Save the decoders for `layerprobe generate`.")
    ] = None,
    width: Annotated[int, typer.Option(help="Width of the decoders; a multiple of 32.")] = 128,
    num_layers: Annotated[int, typer.Option(help="Layers of the decoders.")] = 2,
    max_length: Annotated[int, typer.Option(metavar="TOKENS", help="Maximum number of tokens of a target.")] = 32,
    max_examples: Annotated[int, typer.Option(help="Maximum number of examples, drawn at random.")] = 5000,
    epochs: Annotated[int, typer.Option(help="Passes over the training examples.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Seed = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1. Default: the CPU with half of the cores.")
    ] = None,
    out: Table = None,
    quiet: Quiet = False,
) -> None:
    """Fit a small decoder to each layer, and one that sees no layer, to measure what can be read from each.

    Example: layerprobe fit-decoder acts --layer 5 --save reader
    """
    check_out(out, save=save)
    from layerprobe.generation.fitting import fit_decoder as fit

    chosen = [_read_layer(layer) for layer in layers or ()]
    numbers = [layer for layer in chosen if isinstance(layer, int)]
    if numbers and len(chosen) > 1:
        raise OptionError(f"--layer {numbers[0]} beside others: a number is one layer alone. Name sites: layers.3.")
    found = fit(
        folder,
        layer=numbers[0] if numbers else layers or None,
        targets=targets,
        width=width,
        num_layers=num_layers,
        max_length=max_length,
        max_examples=max_examples,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        progress=False if quiet else None,
    )
    if save is not None:
        found.save(save)
    conclude(found, out, kept=save, quiet=quiet)


def lens(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or 'demo'.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Texts as for extract, or a store of the model.")],
    patterns: Annotated[
        list[str] | None,
        typer.Option(
            "--sites",
            "-s",
            metavar="PATTERN",
            help="Sites. Default: the embeddings, every layer and the final norm.",
        ),
    ] = None,
    mask: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Share of the tokens to mask and evaluate. Default: 0.15 if the model has a head."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens to evaluate.")] = 4096,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also print some tokens with the prediction and rank at each layer.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    out: Table = None,
    quiet: Quiet = False,
) -> None:
    """Show what the model would predict from each layer: rank and probability of the true token.

    Example: layerprobe lens bert-base-uncased texts.txt -o lens.png
    """
    check_out(out)
    from layerprobe.generation.lens import lens as look

    found = look(
        model,
        source,
        sites=patterns,
        mask=mask,
        max_tokens=max_tokens,
        seed=seed,
        device=device,
        progress=False if quiet else None,
    )
    conclude(found, out, more=found.grid() if tokens else "", quiet=quiet)


def _read_layer(layer: str) -> int | str:
    return int(layer) if layer.removeprefix("-").isdecimal() else layer
