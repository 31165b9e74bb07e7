"""`rewardtune rewards calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rewardtune.cli.command import Json, command, quiet_stdout, show, show_json, show_table
from rewardtune.cli.lists import rewards


@command(rewards, "calibrate")
def rewards_calibrate(
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Preference records (docs/data.md).")],
    reward: Annotated[
        list[str],
        typer.Option("--reward", metavar="NAME[:option=value,...]", help="A name of `rewards list`. Repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page goes.")] = Path("calibration"),
    dimension: Annotated[
        str | None,
        typer.Option("--dimension", metavar="NAME", help="Whose scores count; the mean of all by default."),
    ] = None,
    skip_failed: Annotated[
        bool, typer.Option("--skip-failed", help="Leave a picture that a reward fails on out, for all rewards.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the best one by default.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.")] = 8,
    as_json: Json = False,
) -> None:
    """Rewards beside your own labels: how often each is right, which to train on, which to keep as judge."""
    with quiet_stdout():
        from rewardtune.calibration.run import calibrate
        from rewardtune.data.rows import counted

        found = calibrate(
            data, reward, dimension=dimension, out=out, device=device, batch_size=batch_size, skip_failed=skip_failed
        )
    if as_json:
        show_json(found.document)
        return
    document = found.document
    found_in = f"{counted(document['pairs'], 'pair')} of {counted(document['prompts'], 'prompt')}"
    show(f"{found_in}, {counted(document['images'], 'picture')}")
    show_table(
        ["reward", "gradient", "pairs right", "clear pairs", "close pairs", "spearman", "ece", "ms/image"],
        [_row(label, row) for label, row in document["rewards"].items()],
    )
    for gap in document["differences"]:
        low, high = gap["hpa"]["ci95"]
        told = "resolved" if gap["hpa"]["resolved"] else "not resolved"
        show(f"{gap['a']} less {gap['b']}: {gap['hpa']['difference']:+z.3f} [{low:+z.3f}, {high:+z.3f}], {told}")
    for warning in document["warnings"]:
        show(f"warning: {warning}")
    verdict = document["verdict"]
    for words in (verdict["headline"], verdict["train"]["words"], verdict["judge"]["words"]):
        show(words)
    show(str(found.page))


def _row(label: str, row: dict[str, Any]) -> list[str]:
    """One line of the table; a dash where the labels or the reward allow no such figure."""
    reliability = row["reliability"]
    return [
        label,
        "yes" if row["differentiable"] else "no",
        *(_figure(row, name) for name in ("hpa", "margin_hpa", "near_hpa", "srcc")),
        f"{reliability['all']['ece']:.3f}" if isinstance(reliability, dict) else "-",
        f"{1000 * row['cost']['seconds_per_image']:.1f}",
    ]


def _figure(row: dict[str, Any], name: str) -> str:
    """`0.812 [0.790, 0.833]`"""
    if row[name] is None:
        return "-"
    interval = row["ci95"].get(name)
    return f"{row[name]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
