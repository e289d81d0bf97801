"""The command that classifies by given labels, or by labels derived from the texts: classify.

It parses arguments and calls the library, and computes nothing; `main` registers it.
"""

from typing import Annotated

import typer

from layerprobe.cli.arguments import Json, Quiet, Seed, StoredSites, Table, Where
from layerprobe.cli.outcomes import check_out, conclude, refuse_given
from layerprobe.errors import OptionError

__all__ = ["classify"]


def classify(
    folder: Where,
    labels: Annotated[str, typer.Option(metavar="FIELD", help="Record field with the labels.")] = "label",
    pool: Annotated[
        str, typer.Option(help="Pooling: mean, cls, max, last, or last4 (the last four layers together).")
    ] = "mean",
    split: Annotated[str | None, typer.Option(metavar="FIELD", help="Record field that is train, dev or test.")] = None,
    group: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Record field; equal values stay in one split.")
    ] = None,
    span: Annotated[
        str | None,
        typer.Option(
            metavar="START,END", help="Two record fields with character offsets: classify that span of each text."
        ),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also fit random labels per type, to measure selectivity.")
    ] = False,
    mdl: Annotated[bool, typer.Option("--mdl", help="Also measure the description length (online code).")] = False,
    untrained: Annotated[
        bool,
        typer.Option("--untrained/--no-untrained", help="Compare with random weights; this runs every text again."),
    ] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Derive labels from the texts: length, a word, word order.")
    ] = False,
    patterns: StoredSites = None,
    max_examples: Annotated[
        int | None, typer.Option(help="Maximum number of examples, drawn at random. Default: 50,000.")
    ] = None,
    json: Json = None,
    out: Table = None,
    save: Annotated[str | None, typer.Option(metavar="FOLDER", help="Save the probe that is best on dev.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Measure how well a linear probe separates classes at each layer, compared with baselines.

    Example: layerprobe classify acts --labels topic --json topics.json
    """
    from layerprobe.analysis.classify import classify as classify_store
    from layerprobe.extract.depth import depth_profile
    from layerprobe.extract.untrained import extract_untrained

    check_out(out, json=json, save=save)
    progress = False if quiet else None
    if profile:
        given = {"--split": split, "--group": group, "--span": span, "--save": save}
        given |= {"--labels": labels != "label", "--control": control, "--mdl": mdl, "--no-untrained": not untrained}
        refuse_given(given, "with --profile: it makes its own tasks. Leave it out.")
        found = depth_profile(
            folder,
            sites=patterns,
            pool=pool,
            max_examples=5000 if max_examples is None else max_examples,
            seed=seed,
            progress=progress,
        )
    else:
        found = classify_store(
            folder,
            labels,
            sites=patterns,
            pool=pool,
            span=_read_span(span),
            split=split,
            group=group,
            control=control,
            mdl=mdl,
            untrained=extract_untrained if untrained else None,
            max_examples=50_000 if max_examples is None else max_examples,
            seed=seed,
            progress=progress,
        )
        if save is not None:
            found.probe.save(save)
    conclude(found, out, json=json, kept=save, quiet=quiet)


def _read_span(span: str | None) -> tuple[str, str] | None:
    if span is None:
        return None
    fields = [field.strip() for field in span.split(",")]
    if len(fields) != 2 or not all(fields):
        raise OptionError(f"--span {span!r}: name two fields, as in --span start,end.")
    return fields[0], fields[1]
