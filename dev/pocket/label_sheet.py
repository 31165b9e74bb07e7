"""Sheets on which people check facts of the pipeline's samples, and their answers as a labels file.

First call: pictures and prompts -> numbered sheets. Second call, with --answers: -> labels for oracle_agreement.py.
The sheets show nothing of what the judge says.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from rewardtune.pocket.scenes import BACKGROUNDS, CONCEPTS, NUMBERS, RELATIONS, SIZE, paste, sprite

COLUMNS, ROWS, SCALE = 3, 3, 4
LINE = 16
"""Pixels between lines of text."""
ART = 84
"""Side of the artwork below a picture, pixels."""
CELL = (520, SIZE * SCALE + ART + 20)  # beside it: number, three lines of caption, a gap, thirteen facts


def in_words(fact: Mapping[str, Any]) -> str:
    """A fact as a person reads it."""
    match fact["kind"]:
        case "object":
            return f"there is a {fact['concept']}"
        case "count":
            word = CONCEPTS[fact["concept"]][1] if fact["count"] > 1 else fact["concept"]
            return f"exactly {NUMBERS[fact['count']] if fact['count'] > 1 else 'one'} {word}"
        case "colour":
            return f"{fact['concept']}: {fact['tint'] or 'in its own colours'}"
        case "size":
            return f"{fact['concept']}: {fact['size']}"
        case "relation":
            return f"{fact['first']} {RELATIONS[fact['relation']]} {fact['second']}"
        case _:
            return f"{fact['background']} background"


def artwork(facts: Sequence[Mapping[str, Any]]) -> Image.Image:
    """What the claimed objects look like as drawn: a strip of clean artwork in the claimed colours and background."""
    tints = {f["concept"]: f["tint"] for f in facts if f["kind"] == "colour"}
    background = next((f["background"] for f in facts if f["kind"] == "background"), "white")
    strip = Image.new("RGB", (max(1, len(tints)) * ART, ART), BACKGROUNDS[background])
    for i, (concept, tint) in enumerate(tints.items()):
        paste(strip, sprite(concept, tint), (i + 0.5) * ART, ART / 2, ART - 12)
    return strip


def sheet(rows: Sequence[tuple[int, Image.Image, Mapping[str, Any]]]) -> Image.Image:
    """One page: number, enlarged picture, the artwork that it should show, caption, numbered facts."""
    page = Image.new("RGB", (COLUMNS * CELL[0], ROWS * CELL[1]), (255, 255, 255))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for k, (number, picture, row) in enumerate(rows):
        x, y = (k % COLUMNS) * CELL[0] + 4, (k // COLUMNS) * CELL[1] + 4
        page.paste(picture.resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.BICUBIC), (x, y))
        pen.rectangle((x - 1, y - 1, x + SIZE * SCALE, y + SIZE * SCALE), outline=(0, 0, 0))
        page.paste(artwork(row["facts"]), (x, y + SIZE * SCALE + 6))
        lines = [f"#{number}", *textwrap.wrap(row["prompt"], 34), ""]
        lines += [f"{i}  {in_words(fact)}" for i, fact in enumerate(row["facts"], 1)]
        for line, text in enumerate(lines):
            colour = (170, 0, 0) if line == 0 else (0, 0, 0)
            pen.text((x + SIZE * SCALE + 8, y + line * LINE), text, fill=colour, font=font)
    return page


def pictures(source: Path) -> list[Image.Image]:
    """The PNGs of a folder in the order of their names, or the 64 x 64 tiles of one PNG, row by row."""
    if source.is_dir():
        return [Image.open(path).convert("RGB") for path in sorted(source.glob("*.png"))]
    tiles = Image.open(source).convert("RGB")
    return [tiles.crop((x, y, x + SIZE, y + SIZE))
            for y in range(0, tiles.height, SIZE) for x in range(0, tiles.width, SIZE)]  # fmt: skip


def answers(path: Path, prompts: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
    """Whether each fact holds, of lines `NUMBER: WRONG FACTS` such as `17: 3 5` or `18:` (all right), one a picture."""
    wrong: dict[int, set[int]] = {}
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            number, _, facts = line.partition(":")
            assert int(number) not in wrong, f"picture {number} is answered twice"
            wrong[int(number)] = {int(f) for f in facts.split()}
    assert sorted(wrong) == list(range(len(prompts))), f"{path}: every picture needs one line"
    out = []
    for number, row in enumerate(prompts):
        numbers = range(1, len(row["facts"]) + 1)
        assert wrong[number] <= set(numbers), f"picture {number} has no fact {wrong[number] - set(numbers)}"
        out.append([i not in wrong[number] for i in numbers])
    return out


def labels(files: Sequence[Path], prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a picture: `votes`, how many labellers say that each fact holds, and `person`, what most of them say."""
    assert len(files) % 2, "an even number of labellers can be undecided"
    by_labeller = [answers(path, prompts) for path in files]
    out = []
    for number, (row, *said) in enumerate(zip(prompts, *by_labeller, strict=True)):
        votes = [sum(fact) for fact in zip(*said, strict=True)]
        person = [2 * v > len(files) for v in votes]
        known = {key: row[key] for key in ("kind", "prompt", "facts") if key in row}
        out.append({"image": number, **known, "person": person, "votes": votes})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="a folder of PNGs, or one PNG of tiles")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL: prompt, facts and, if any, kind of sample")
    parser.add_argument("--out", type=Path, required=True, help="folder for the sheets; with --answers the labels file")
    parser.add_argument("--answers", type=Path, nargs="+", help="a file a labeller; an odd number of them")
    args = parser.parse_args()
    prompts = [json.loads(line) for line in args.prompts.read_text().splitlines() if line.strip()]
    if args.answers:
        rows = labels(args.answers, prompts)
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} pictures, {sum(len(r['person']) for r in rows)} facts -> {args.out}")
        return
    images = pictures(args.images)[: len(prompts)]
    assert len(images) == len(prompts), f"{len(images)} pictures but {len(prompts)} prompts"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = list(zip(range(len(images)), images, prompts, strict=True))
    for start in range(0, len(rows), COLUMNS * ROWS):
        sheet(rows[start : start + COLUMNS * ROWS]).save(args.out / f"sheet-{start // (COLUMNS * ROWS):02d}.png")
    # the tiles of all pictures in one lossless file, small enough to be committed beside the labels
    tiles = Image.new("RGB", (15 * SIZE, -(-len(images) // 15) * SIZE))
    for i, image in enumerate(images):
        tiles.paste(image, (i % 15 * SIZE, i // 15 * SIZE))
    tiles.save(args.out / "tiles.png", optimize=True)


if __name__ == "__main__":
    main()
