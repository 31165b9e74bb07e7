"""What four dimensions cost against one: the same pictures and prompts through one scorer, 256 image tokens each.

Writes scorer_dimensions.json beside this script. Arms alternate, so that drifts of the machine hit both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from rewardtune.scorer.model import Scorer, load_scorer
from rewardtune.scorer.rubric import reading

PROMPT = "a red dog to the left of two cats with a blue car above them on a white background"


def with_dimensions(scorer: Scorer, count: int) -> Scorer:
    """The scorer, asked for its first `count` dimensions only."""
    rubric = scorer.rubric.model_copy(
        update={"dimensions": scorer.rubric.dimensions[:count], "reads": scorer.rubric.reads[:count]}
    )
    return replace(scorer, rubric=rubric, reading=reading(rubric, scorer.tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scorer", default="pocket:scorer-base")
    parser.add_argument("--tokens", type=int, default=256, help="image tokens, a square number")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scorer = load_scorer(args.scorer)
    side = round(args.tokens**0.5) * scorer.geometry.patch * scorer.geometry.merge
    scorer = replace(scorer, geometry=replace(scorer.geometry, min_pixels=side * side, max_pixels=side * side))
    assert scorer.geometry.tokens(side, side) == args.tokens
    images = torch.rand(args.batch, 3, side, side, generator=torch.Generator().manual_seed(0))

    def forward(asked: Scorer) -> None:
        with torch.no_grad():
            asked.distribution(images, [PROMPT] * args.batch)

    def gradient(asked: Scorer) -> None:
        pixels = images.clone().requires_grad_()
        (asked.distribution(pixels, [PROMPT] * args.batch) @ asked.levels).sum().backward()

    arms: dict[str, tuple[Callable[[Scorer], None], Scorer]] = {
        f"{name}, {count} dimension{'s' * (count > 1)}": (run, with_dimensions(scorer, count))
        for name, run in (("forward", forward), ("forward and pixel gradient", gradient))
        for count in (1, 4)
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats + 2):
        for name, (run, asked) in arms.items():
            started = time.perf_counter()
            run(asked)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - started)
    ratio = {
        name: statistics.median(seconds[f"{name}, 4 dimensions"]) / statistics.median(seconds[f"{name}, 1 dimension"])
        for name in ("forward", "forward and pixel gradient")
    }
    document = {
        "what": f"seconds for {args.batch} pictures at {args.tokens} image tokens, one pass for all dimensions; ratio "
        "of the medians, four dimensions to one",
        "machine": {"processor": platform.machine(), "threads": args.threads},
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "repeats": args.repeats,
        "arms": {
            name: {"min": min(s), "median": statistics.median(s), "max": max(s)} for name, s in seconds.items()
        },
        "ratio": ratio,
    }  # fmt: skip
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
