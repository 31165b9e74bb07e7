"""`rewardtune rewards convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewardtune.cli.command import Json, command, quiet_stdout, show, show_json
from rewardtune.cli.lists import rewards


@command(rewards, "convert")
def rewards_convert(
    spec: Annotated[
        str, typer.Argument(metavar="NAME[:option=value,...]", help="The reward, with what it needs besides weights.")
    ],
    file: Annotated[Path, typer.Argument(help="The published checkpoint, a pickle of torch.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Beside it, with the ending .safetensors, by default.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Read all that is in the file. This RUNS the code in it, with your rights.")
    ] = False,
    option: Annotated[
        str, typer.Option("--option", help="The option of the reward that names its weights.")
    ] = "checkpoint",
    as_json: Json = False,
) -> None:
    """Make a safetensors file of a published pickle, once, and load the reward from it before it is kept."""
    from rewardtune import registry
    from rewardtune.scoring.score import parse_spec

    name, options = parse_spec(spec)
    registry.rewards.load_class(name)
    with quiet_stdout():
        from rewardtune.backbones.convert import convert

        made = convert(name, file, out, trust=trust, option=option, **options)
    if as_json:
        show_json({"file": str(made), "reward": name, "option": option})
    else:
        show(str(made))
