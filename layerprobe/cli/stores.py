"""Commands that look at a store and need no model: info, show.

Parse and call; compute nothing. `main` gives each its name and place.
"""

from typing import Annotated

import typer

from layerprobe.cli.views import describe_example, describe_store

__all__ = ["info", "show"]

# not a Path, which would make one slash of the two in a URL
Where = Annotated[str, typer.Argument(metavar="DIR", help="A store: a folder, or a URL such as s3://bucket/acts.")]


def info(folder: Where) -> None:
    """Say what a store holds.

    Example: layerprobe info acts
    """
    from layerprobe.store.reader import open_store

    typer.echo(describe_store(open_store(folder)))


def show(
    folder: Where,
    example: Annotated[int, typer.Argument(metavar="EXAMPLE", help="Its ordinal; negative ones count from the last.")],
) -> None:
    """Print an example's tokens and the norm of each site.

    Example: layerprobe show acts 17
    """
    from layerprobe.store.reader import open_store

    typer.echo(describe_example(open_store(folder).example(example)))
