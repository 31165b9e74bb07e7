"""`rewardtune rewards probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewardtune.cli.command import Json, command, quiet_stdout, show, show_json, show_table
from rewardtune.cli.lists import rewards


@command(rewards, "probe")
def rewards_probe(
    spec: Annotated[str, typer.Argument(metavar="NAME[:option=value,...]", help="A differentiable reward.")],
    images: Annotated[
        str | None, typer.Option("--images", metavar="PATH", help="A folder, manifest or picture; else some are drawn.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="A line for each image in order, or one for all.")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option("--judge", metavar="NAME[:option=value,...]", help="Looks on. Repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the ascent, over all budgets.")] = 50,
    pictures: Annotated[int, typer.Option("--pictures", min=1, help="How many to take or draw, beside noise.")] = 4,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="a,b", help="How far a pixel may move, in steps of 1/255.")
    ] = "2,4,8,16,32",
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn, and of the noise.")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page goes.")] = Path("probe"),
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the best one by default.")] = None,
    as_json: Json = False,
) -> None:
    """Climb a reward by pixels alone while other rewards look on: what does it praise that is not in the picture?"""
    from rewardtune.errors import RecipeError

    try:
        limits = [int(word) for word in budgets.split(",")]
    except ValueError:
        raise RecipeError(f"--budgets {budgets!r}: give whole numbers such as 2,8,32.") from None
    with quiet_stdout():
        from rewardtune.probe.run import probe

        found = probe(
            spec, images=images, prompts=prompts, judges=judge, steps=steps, pictures=pictures, budgets=limits,
            seed=seed, out=out, device=device,
        )  # fmt: skip
    if as_json:
        show_json(found.document)
        return
    document = found.document
    names = [document["reward"]["label"], *document["judges"]]
    start = document["budgets"][0]["rewards"]
    rows = [["start", *(f"{start[name]['before']:.3f}" for name in names), "-"]]
    for entry in document["budgets"]:
        values = [f"{entry['rewards'][name]['after']:.3f}" for name in names]
        rows.append([f"{entry['budget']}/255", *values, f"{255 * entry['change']['rms']:.1f}/255"])
    show_table(["a pixel may move by", *names, "moved (RMS)"], rows)
    show(document["verdict"]["headline"])
    for words in document["verdict"]["words"]:
        show(words)
    show(str(found.page))
