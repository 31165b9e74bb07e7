"""The page of the Z-Reward table, from the rows' files: figures with intervals, what they say, the paper's beside."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zreward_plots import draw

METRICS = ("hpa", "margin_hpa", "near_hpa", "plcc", "srcc", "ece")
DRAWS = 2000
"""Bootstrap resamples (ours)."""
# Z-Reward, arXiv 2606.09076 v2, Tables 2 and 3: (size, method) -> HPA, margin HPA, PLCC, SRCC. On the authors' data.
PAPER = {
    ("teacher", "zero-shot"): (0.7438, 0.9538, 0.6301, 0.5816),
    ("teacher", "sft"): (0.8135, 0.9644, 0.6458, 0.5914),
    ("teacher", "rewarddance"): (0.8425, 0.9706, 0.6667, 0.6207),
    ("teacher", "grpo"): (0.8604, 0.9827, 0.7200, 0.6832),
    ("teacher", "gdso"): (0.8956, 0.9885, 0.7620, 0.7132),
    ("student", "zero-shot"): (0.6563, 0.7501, 0.3411, 0.3167),
    ("student", "sft"): (0.7459, 0.8401, 0.5296, 0.4942),
    ("student", "rewarddance"): (0.7817, 0.8972, 0.5182, 0.4338),
    ("student", "grpo"): (0.7703, 0.9076, 0.5340, 0.5072),
    ("student", "gdso"): (0.8395, 0.9599, 0.6341, 0.5665),
    ("student", "risd"): (0.8864, 0.9801, 0.7391, 0.6882),
    ("student", "opd"): (0.8311, 0.9643, None, None),
}
CLAIMS = [
    ("GDSO above GRPO, teacher's size", "teacher-gdso", "teacher-grpo", 0.0),
    ("GDSO above RewardDance, teacher's size", "teacher-gdso", "teacher-dance", 0.0),
    ("GDSO above SFT, teacher's size", "teacher-gdso", "teacher-sft", 0.0),
    ("GDSO above GRPO, student's size", "student-gdso", "student-grpo", 0.0),
    ("GDSO above RewardDance, student's size", "student-gdso", "student-dance", 0.0),
    ("GDSO above SFT, student's size", "student-gdso", "student-sft", 0.0),
    ("the RISD student within 1.0 point of its teacher", "student-risd", "teacher-gdso", -0.01),
    ("RISD above GDSO of the student's size", "student-risd", "student-gdso", 0.0),
    ("RISD above SFT of the student's size", "student-risd", "student-sft", 0.0),
    ("RISD above OPD", "student-risd", "student-opd", 0.0),
]
"""What is stated, row, other row, and the difference in HPA that must be exceeded."""
Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """A row's seeds: figures, and (seeds, groups, 4) right and counted wide pairs, right and counted near ones."""

    name: str
    size: str
    method: str
    control: str
    figures: list[dict[str, Any]]
    counts: Counts

    def mean(self, metric: str) -> float | None:
        values = [f[metric] for f in self.figures]
        return None if None in values else float(np.mean(values))


PARTS: dict[str, Callable[[Counts], Counts]] = {
    "hpa": lambda c: (c[..., 0] + c[..., 2]) / (c[..., 1] + c[..., 3]),
    "margin_hpa": lambda c: c[..., 0] / c[..., 1],
    "near_hpa": lambda c: c[..., 2] / c[..., 3],
}


def resampled(counts: Counts, groups: NDArray[np.int64], seeds: NDArray[np.int64]) -> Counts:
    """(draws, 4) summed counts of resampled groups, averaged over resampled seeds."""
    per_seed = np.stack([counts[s][groups].sum(1) for s in range(len(counts))])
    return np.take_along_axis(per_seed.transpose(1, 0, 2), seeds[..., None], 1).mean(1)


def draws(groups: int, seeds: int, *, stream: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which groups and seeds each resample takes; rows of one table share the groups, so differences are paired."""
    rng, other = np.random.default_rng(0), np.random.default_rng(1 + stream)
    return rng.integers(groups, size=(DRAWS, groups)), other.integers(seeds, size=(DRAWS, seeds))


def intervals(row: Found) -> dict[str, list[float]]:
    """95 % over groups and seeds: a bootstrap for pair accuracies; for the others the groups' own, widened by the
    seeds' spread."""
    summed = resampled(row.counts, *draws(row.counts.shape[1], len(row.counts)))
    out = {name: np.percentile(part(summed), [2.5, 97.5]).tolist() for name, part in PARTS.items()}
    for name in ("plcc", "srcc", "ece"):
        mean, ends = row.mean(name), [f["ci95"].get(name) for f in row.figures]
        if mean is None or None in ends:
            continue
        within = np.mean([((high - low) / 3.92) ** 2 for low, high in ends])
        values = [f[name] for f in row.figures]
        between = np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0
        half = 1.96 * float(np.sqrt(within + between))
        out[name] = [mean - half, mean + half]
    return out


def difference(a: Found, b: Found) -> tuple[float, float, float]:
    """HPA of a minus that of b, and its 95 % interval over the same groups and over seeds."""
    part, found = PARTS["hpa"], []
    for stream, row in enumerate((a, b)):
        found.append(part(resampled(row.counts, *draws(row.counts.shape[1], len(row.counts), stream=stream))))
    low, high = np.percentile(found[0] - found[1], [2.5, 97.5])
    means = [float(np.mean(part(row.counts.sum(1)))) for row in (a, b)]
    return means[0] - means[1], float(low), float(high)


def verdict(difference: tuple[float, float, float], threshold: float) -> str:
    _, low, high = difference
    return "holds" if low > threshold else "does not hold" if high < threshold else "not resolved"


def load(results: Path, row: Any, seeds: int) -> Found | None:
    """The finished seeds of a row, or None."""
    stems = [results / f"{row.name}-s{seed}" for seed in range(seeds)]
    stems = [stem for stem in stems if stem.with_suffix(".json").exists()]
    if not stems:
        return None
    figures = [json.loads(stem.with_suffix(".json").read_text()) for stem in stems]
    counts = np.stack([np.load(stem.with_suffix(".npz"))["pairs"].astype(np.float64) for stem in stems])
    return Found(row.name, row.size, row.method, row.control, figures, counts)


def report(results: Path, page: Path, table: Sequence[tuple[Any, int]]) -> None:
    """Write the page and its .json from the rows that are finished."""
    found = [f for row, seeds in table if (f := load(results, row, seeds)) is not None]
    if not found:
        raise SystemExit(f"{results} holds no finished row.")
    by_name = {f.name: f for f in found}
    claims = []
    for text, a, b, threshold in CLAIMS:
        if a in by_name and b in by_name:
            gap = difference(by_name[a], by_name[b])
            seeds = min(len(by_name[a].figures), len(by_name[b].figures))
            claims.append((text, gap, verdict(gap, threshold), seeds))
    groups = found[0].counts.shape[1]
    main, controls = [f for f in found if not f.control], [f for f in found if f.control]
    lines = [
        "# The Z-Reward table on the pocket world", "",
        f"{groups:,} test groups of compositions that no training saw; `python dev/pocket/zreward_table.py run` makes "
        "it again. In brackets: 95 % over groups and seeds. Below each line of ours, where the paper has one, theirs "
        "(arXiv 2606.09076 v2, Tables 2 and 3): other models, other data, other people.", "",
        "| size | method | seeds | HPA | margin HPA | near HPA | PLCC | SRCC | ECE | tokens | ms a score |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in main:
        lines += [_line(row), *_paper(row)]
    if claims:
        lines += ["", "## What it says", "", "Differences in HPA, paired over the test groups.", "",
                  "| claim | difference | | seeds |", "| --- | --- | --- | --- |"]  # fmt: skip
        lines += [f"| {text} | {d:+.3f} [{low:+.3f}, {high:+.3f}] | {said} | {seeds} |"
                  for text, (d, low, high), said, seeds in claims]  # fmt: skip
    if controls:
        lines += ["", "## Controls", "", "One seed each.", "",
                  "| size | method | control | HPA | margin HPA | near HPA | PLCC | SRCC | ECE | tokens |",
                  "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        for row in controls:
            cells = _cells(row)
            lines.append("| " + " | ".join([row.size, row.method, row.control, *cells[:6], cells[6]]) + " |")
    left = []
    for row, seeds in table:
        trained = len(by_name[row.name].figures) if row.name in by_name else 0
        if trained < seeds:
            left.append(f"{row.name} at {seeds - trained} of {seeds} seeds" if trained else row.name)
    if left:
        lines += ["", f"Not trained yet: {', '.join(left)}."]
    page.parent.mkdir(parents=True, exist_ok=True)
    lines += draw(results, page, found)
    page.write_text("\n".join(lines) + "\n")
    document = {
        "seeds": max(len(f.figures) for f in found), "groups": groups,
        "rows": [_document(f) for f in main], "controls": [_document(f) for f in controls],
        "claims": [{"claim": text, "difference": d, "ci95": [low, high], "verdict": said, "seeds": seeds}
                   for text, (d, low, high), said, seeds in claims],
    }  # fmt: skip
    page.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def _document(row: Found) -> dict[str, Any]:
    keys = (*METRICS, "tokens_per_score", "seconds_per_score")
    out = {"name": row.name, "size": row.size, "method": row.method, **{key: row.mean(key) for key in keys}}
    out |= {"ci95": intervals(row), "per_seed": [{key: f[key] for key in keys} for f in row.figures]}
    return out | ({"control": row.control} if row.control else {})


def _cells(row: Found) -> list[str]:
    ends, cells = intervals(row), []
    for name in METRICS:
        value = row.mean(name)
        interval = f" [{ends[name][0]:.3f}, {ends[name][1]:.3f}]" if name in ends else ""
        cells.append("-" if value is None else f"{value:.3f}{interval}")
    tokens, seconds = row.mean("tokens_per_score"), row.mean("seconds_per_score")
    assert tokens is not None and seconds is not None
    return [*cells, f"{tokens:.1f}", f"{1000 * seconds:.1f}"]


def _line(row: Found) -> str:
    return "| " + " | ".join([row.size, row.method, str(len(row.figures)), *_cells(row)]) + " |"


def _paper(row: Found) -> list[str]:
    theirs = PAPER.get((row.size, row.method))
    if theirs is None:
        return []
    hpa, margin, plcc, srcc = ("-" if v is None else f"*{v:.4f}*" for v in theirs)
    return [f"| | *the paper's* | | {hpa} | {margin} | | {plcc} | {srcc} | | | |"]
