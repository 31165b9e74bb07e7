"""`rewardtune score`: images on disk -> one row an image with what a reward says of it.

`compare` reads its images through the same functions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardtune.errors import DataError, RecipeError
from rewardtune.types import Prompt

if TYPE_CHECKING:
    from rewardtune.data.rows import Mistakes
    from rewardtune.plugins import Reward, RewardCard
    from rewardtune.types import Score

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class ImageScore:
    """What a reward says of one image, in plain numbers.

    parts: None where the reward has nothing to say of this image (it gave NaN), e.g. a count that no prompt asked for.
    levels (K,), distribution (D, K) and dimensions (name -> expectation) are None for a scalar reward.
    """

    value: float
    parts: Mapping[str, float | None]
    levels: list[float] | None = None
    distribution: list[list[float]] | None = None
    dimensions: Mapping[str, float] | None = None


def score_images(
    spec: str,
    *,
    images: str | Path,
    prompts: str | Path | None = None,
    device: str | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a folder of images, or those that a manifest names: the document of `score --json`.

    spec: NAME[:option=value,...]. images: a folder (PNG, JPEG, WebP in the order of their names), a picture, or a
    .jsonl or .parquet manifest with `image` and, if prompts are known, `prompt` or `caption`. prompts: a prompt file
    with one line for each image in that order, or a single line for all. progress: called with (done, total).
    Raises RecipeError for the spec, DataError for images and prompts, NonFiniteError for a value that is not finite.
    """
    from rewardtune import registry
    from rewardtune.scoring.reward_set import load_reward

    name, options = parse_spec(spec)
    card: RewardCard = registry.rewards.card(name)
    files, captions = find_images(Path(images))
    texts = prompts_for(files, captions, prompts)
    if texts is None and card.needs_prompt:
        raise RecipeError(
            f"reward {name!r} judges an image by its prompt, and none is given. Add --prompts FILE with one line for "
            "each image, or a manifest whose rows have `image` and `prompt`."
        )
    if device is None:
        device = best_device()
    reward = load_reward(name, device=device, **options)
    asked = texts if texts is not None else [Prompt("")] * len(files)
    rows: list[dict[str, Any]] = []
    for file, score in zip(
        files, score_files(reward, files, asked, device=device, batch_size=batch_size, progress=progress), strict=True
    ):
        rows.append(
            {
                "image": str(file),
                "prompt": str(texts[len(rows)]) if texts is not None else None,
                **dataclasses.asdict(score),
            }
        )
    return {"reward": card_document(reward.card), "rows": rows}


def score_files(
    reward: Reward,
    files: Sequence[Path],
    prompts: Sequence[str],
    *,
    device: str,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[ImageScore]:
    """Open and score images in order, a batch at a time; a batch ends early where the picture size changes."""
    import torch

    from rewardtune.data.images import open_image, to_tensor
    from rewardtune.scoring.checked import check_score

    start = 0
    while start < len(files):
        pictures = [open_image(files[start])]
        for file in files[start + 1 : start + batch_size]:
            picture = open_image(file)
            if picture.size != pictures[0].size:
                break
            pictures.append(picture)
        stop = start + len(pictures)
        with torch.no_grad():
            score = reward.score(to_tensor(pictures).to(device), prompts[start:stop])
        check_score(reward.card.name, score, len(pictures))
        yield from _plain(score)
        start = stop
        if progress is not None:
            progress(stop, len(files))


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`NAME[:option=value,...]` -> name and options; values are JSON where they read as such, else words.

    `NAME:{"option": value}` is taken too, for values that hold a comma.
    """
    name, colon, rest = spec.partition(":")
    options: dict[str, Any] = {}
    if rest.startswith("{"):
        try:
            options, rest, colon = dict(json.loads(rest)), "", ""
        except ValueError as error:
            raise RecipeError(f"reward {spec!r}: what follows the name is not a JSON object ({error}).") from error
    for piece in rest.split(",") if colon else ():
        option, equals, value = piece.partition("=")
        if not equals or not option.strip():
            raise RecipeError(f"reward {spec!r}: {piece!r} is not option=value. Write NAME:option=value,option=value.")
        if option.strip() in options:
            raise RecipeError(f"reward {spec!r}: the option {option.strip()!r} is given twice.")
        try:
            options[option.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[option.strip()] = value
    if not name.strip():
        raise RecipeError(f"reward {spec!r} has no name. Write NAME or NAME:option=value.")
    return name.strip(), options


def parse_specs(text: str) -> list[str]:
    """`a,b:x=1,y=2,c` -> ["a", "b:x=1,y=2", "c"]: a piece with `=` and no name of its own belongs to the one before."""
    specs: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        if specs and "=" in piece and ":" not in piece.split("=")[0]:
            specs[-1] += f",{piece}"
        else:
            specs.append(piece)
    return specs


def find_images(source: Path) -> tuple[list[Path], list[Prompt] | None]:
    """Image files of a folder, a manifest or a picture, and their prompts where a manifest gives one to every row.

    Raises DataError when there are none.
    """
    if source.is_file() and source.suffix.lower() in _SUFFIXES:
        return [source], None
    if source.is_dir():
        found = sorted(f for f in source.iterdir() if f.suffix.lower() in _SUFFIXES)
        if not found:
            raise DataError(f"{source}: the folder holds no images (PNG, JPEG or WebP).")
        return found, None
    if not source.exists():
        raise DataError(f"{source}: there is no such folder or manifest.")
    from rewardtune.data.rows import ImageFolder, Mistakes, read_rows

    mistakes, folder = Mistakes(source), ImageFolder(source.parent)
    files: list[Path] = []
    captions: list[Prompt | None] = []
    for line, row in read_rows(source, mistakes):
        path = folder.find(row.get("image"), "image", line, mistakes)
        text = row.get("prompt", row.get("caption"))
        if captions and (text is None) != (captions[0] is None):
            mistakes.add(line, "some rows have a `prompt` or `caption` and some have none.")
        if path is not None:
            files.append(path)
            captions.append(_prompt(text, row, line, mistakes))
    mistakes.stop()
    if not files:
        raise DataError(f"{source}: there are no rows in it.")
    return files, None if captions[0] is None else [c for c in captions if c is not None]


def best_device() -> str:
    """The best device there is: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def card_document(card: RewardCard) -> dict[str, Any]:
    """A card as JSON has it."""
    plain = {**dataclasses.asdict(dataclasses.replace(card, models={})), "models": dict(card.models)}
    document: dict[str, Any] = json.loads(json.dumps(plain))
    return document


def _plain(score: Score) -> Iterator[ImageScore]:
    """(B,) tensors -> B records of Python numbers."""
    parts = {
        name: [x if math.isfinite(x) else None for x in tensor.detach().float().cpu().tolist()]
        for name, tensor in score.parts.items()
    }
    values = score.value.detach().float().cpu().tolist()
    if score.distribution is None or score.levels is None:
        for i, value in enumerate(values):
            yield ImageScore(value, {name: column[i] for name, column in parts.items()})
        return
    table = score.distribution.detach().float().cpu()
    levels = score.levels.detach().float().cpu()
    means = (table @ levels).tolist()
    for i, value in enumerate(values):
        yield ImageScore(
            value,
            {name: column[i] for name, column in parts.items()},
            levels.tolist(),
            table[i].tolist(),
            dict(zip(score.dimensions, means[i], strict=True)),
        )


def prompts_for(files: Sequence[Path], captions: list[Prompt] | None, source: str | Path | None) -> list[Prompt] | None:
    """A prompt an image: those of the file `source`, else those of the manifest; None where there are none."""
    if source is None:
        return captions
    from rewardtune.data.records import read_prompts

    prompts = list(read_prompts(str(source)))
    if len(prompts) == 1:
        return prompts * len(files)
    if len(prompts) != len(files):
        raise DataError(
            f"{source}: {len(prompts)} prompts for {len(files)} images. Give one line for each image, in the order of "
            "the file names, or a single line for all."
        )
    return prompts


def _prompt(text: Any, row: Mapping[str, Any], line: int, mistakes: Mistakes) -> Prompt | None:
    """A row's prompt with the other columns as metadata, as `read_prompts` gives it."""
    from rewardtune.data.rows import check_text

    if text is None or not check_text(text, "prompt", line, mistakes):
        return None
    return Prompt(text, {k: v for k, v in row.items() if k not in ("prompt", "caption", "image")})
