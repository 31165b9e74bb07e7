"""`rewardtune rewards probe`, top to bottom: pictures, ascent, everybody's verdict on the way, page."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.compare.scores import choose_rewards, tie_bands
from rewardtune.data.images import to_pil
from rewardtune.data.rows import counted
from rewardtune.errors import MissingExtra, OutOfMemoryError, RecipeError
from rewardtune.pages.files import Written, write_bytes
from rewardtune.plugins import Reward, RewardCard
from rewardtune.probe.ascent import BUDGETS, REACH, Step, ascend, plan, rounded
from rewardtune.probe.page import render
from rewardtune.probe.starts import Start, find_starts
from rewardtune.probe.verdict import decide
from rewardtune.progress import Progress
from rewardtune.recipe.rewards import RewardSection
from rewardtune.scoring.score import best_device, card_document, parse_spec

FILE, PAGE = "probe.json", "probe.html"
STEPS, PICTURES, LOOKS = 50, 4, 20
"""Ours: about a minute for a small reward on two CPU cores."""


@dataclass
class _Walk:
    """What was seen on the way. looks: step -> label -> (B,) values. shown: step -> (3, H, W) for each start."""

    values: dict[int, dict[str, list[float]]]
    shown: dict[int, list[Tensor]]


def probe(
    spec: str,
    *,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    judges: Sequence[str] | None = None,
    steps: int = STEPS,
    pictures: int = PICTURES,
    budgets: Sequence[int] = BUDGETS,
    seed: int = 0,
    out: str | Path = "probe",
    device: str | None = None,
) -> Written:
    """Climb one reward by pixels alone, let the judges look on, and write `probe.json`, `probe.html` and `images/`.

    spec: NAME[:option=value,...] of a differentiable reward. images, prompts: as for `rewardtune score`; without images
    the pocket pipeline draws. judges: specs; when None, the rewards that call themselves held out, if the prompts are
    the pocket world's. The same seed gives the same pictures and figures on the same machine. Raises RecipeError for a
    reward without gradient.
    """
    started = time.monotonic()
    walk = plan(steps, budgets)
    sections = [RewardSection(name=name, options=options) for name, options in map(parse_spec, [spec, *(judges or ())])]
    if judges is None and images is None and prompts is None:
        sections += [RewardSection(name=name) for name in _held_out() if name != sections[0].name]
    chosen = choose_rewards(sections, (), None).rewards
    label = next(iter(chosen))
    if judges is not None and len(chosen) < 1 + len(judges):
        raise RecipeError(f"--judge: name each judge once, and none that is {label!r} itself with the same options.")
    _check(chosen)
    device = device or best_device()
    starts = find_starts(
        images=images, prompts=prompts, count=pictures, seed=seed, device=device,
        needs_prompt=any(_card(section).needs_prompt for section in chosen.values()),
    )  # fmt: skip
    loaded = {name: _load(section, device=device) for name, section in chosen.items()}
    _refuse(loaded[label].card)
    try:
        seen = _climb(label, loaded, starts, walk, device=device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"reward {label!r} ran out of memory on {counted(len(starts), 'picture')} and its gradient ({error}). Take "
            "fewer: --pictures 1, or smaller ones."
        ) from error
    document = _document(label, chosen, loaded, starts, walk, seen, seed=seed)
    document["verdict"] = decide(document)
    document["seconds"] = round(time.monotonic() - started, 1)
    folder = Path(out)
    _write_images(folder, starts, walk, seen)
    write_bytes(folder / FILE, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    page = render(document, [{step: seen.shown[step][i] for step in seen.shown} for i in range(len(starts))])
    write_bytes(folder / PAGE, page.encode())
    return Written(folder, document, folder / PAGE)


# --------------------------------------------------------------------------------------------------------- the rewards


def _card(section: RewardSection) -> RewardCard:
    from rewardtune import registry

    card: RewardCard = registry.rewards.card(section.name)
    return card


def _held_out() -> list[str]:
    """Rewards at hand that no shipped recipe trains on."""
    from rewardtune import registry
    from rewardtune.recipe.validate import missing_requirement

    at_hand = [name for name in registry.rewards.names() if registry.rewards.trouble(name) is None]
    cards = [registry.rewards.card(name) for name in at_hand if registry.rewards.is_at_hand(name)]
    return [card.name for card in cards if card.held_out and missing_requirement(card) is None]


def _check(chosen: Mapping[str, RewardSection]) -> None:
    """What can be known before anything is drawn or loaded."""
    from rewardtune.recipe.validate import missing_requirement

    for section in chosen.values():
        if why := missing_requirement(_card(section)):
            raise MissingExtra(f"reward {section.name!r} {why}")
    first = _card(next(iter(chosen.values())))
    if not first.known_when_loaded:
        _refuse(first)


def _refuse(card: RewardCard) -> None:
    if not card.differentiable:
        raise RecipeError(
            f"reward {card.name!r} returns no gradient ({card.summary}), so there is nothing to climb and nothing "
            "can be trained on it. Let it judge a differentiable one: "
            f"`rewardtune rewards probe NAME --judge {card.name}`."
        )


def _load(section: RewardSection, *, device: str) -> Reward:
    from rewardtune.scoring.reward_set import load_section

    return load_section(section, device=device)


# ----------------------------------------------------------------------------------------------------------- the walk


def _climb(
    label: str, loaded: Mapping[str, Reward], starts: Sequence[Start], walk: Sequence[Step], *, device: str
) -> _Walk:
    """Pictures of one size go together; each is moved by its own gradient alone."""
    every = -(-len(walk) // LOOKS)
    looks = [0, *(i + 1 for i, step in enumerate(walk) if step.ends_budget or (i + 1) % every == 0)]
    kept = [0, *(i + 1 for i, step in enumerate(walk) if step.ends_budget)]
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, start in enumerate(starts):
        sizes.setdefault(tuple(start.image.shape), []).append(i)
    values: dict[int, dict[str, list[float]]] = {s: {name: [0.0] * len(starts) for name in loaded} for s in looks}
    shown: dict[int, list[Tensor]] = {s: [start.image for start in starts] for s in kept}
    progress = Progress(f"climbing {label}", len(sizes) * len(walk))
    for members in sizes.values():
        asked = [starts[i].prompt for i in members]

        def look(step: int, images: Tensor, members: list[int] = members, asked: list[Any] = asked) -> None:
            if step:
                progress.advance(1)
            if step not in values:
                return
            # judged as a file would hold it: what rounding takes away was never there
            pictures = rounded(images)
            with torch.no_grad():
                said = {name: reward.score(pictures, asked).value.tolist() for name, reward in loaded.items()}
            for at, i in enumerate(members):
                for name in loaded:
                    values[step][name][i] = float(said[name][at])
                if step in shown:
                    shown[step][i] = pictures[at].cpu()

        batch = torch.stack([starts[i].image for i in members]).to(device)
        ascend(loaded[label], batch, asked, walk, look)
    return _Walk(values, shown)


# --------------------------------------------------------------------------------------------------------- the figures


def _document(
    label: str,
    chosen: Mapping[str, RewardSection],
    loaded: Mapping[str, Reward],
    starts: Sequence[Start],
    walk: Sequence[Step],
    seen: _Walk,
    *,
    seed: int,
) -> dict[str, Any]:
    described = {name: _described(name, chosen[name], reward) for name, reward in loaded.items()}
    ends = [i + 1 for i, step in enumerate(walk) if step.ends_budget]
    return {
        "reward": described[label],
        "judges": {name: one for name, one in described.items() if name != label},
        "rule": {
            "steps": len(walk),
            "budgets": [round(walk[end - 1].budget * 255) for end in ends],
            "step": f"{REACH} x what a budget adds / its number of steps, along the sign of the gradient",
            "seed": seed,
        },
        "starts": [
            {"name": s.name, "kind": s.kind, "prompt": str(s.prompt), "size": [s.image.shape[2], s.image.shape[1]]}
            for s in starts
        ],
        "looks": [
            {"step": step, "budget": round(walk[step - 1].budget * 255) if step else 0, "values": found}
            for step, found in sorted(seen.values.items())
        ],
        "budgets": [
            _budget(end, walk, starts, described, seen)
            | {"highest": _highest(begin, end, starts, described[label], seen)}
            for begin, end in zip([0, *ends[:-1]], ends, strict=True)
        ],
    }


def _described(label: str, section: RewardSection, reward: Reward) -> dict[str, Any]:
    card = card_document(reward.card)
    keep = ("name", "differentiable", "higher_is_better", "range", "scale", "held_out", "models")
    return {"label": label, "options": section.options, **{key: card[key] for key in keep},
            "tie_band": tie_bands(reward)[0]}  # fmt: skip


def _budget(
    end: int, walk: Sequence[Step], starts: Sequence[Start], described: Mapping[str, Any], seen: _Walk
) -> dict[str, Any]:
    """Everybody's verdict where a budget is used up."""
    real = [i for i, start in enumerate(starts) if start.kind != "noise"]
    noise = next(i for i, start in enumerate(starts) if start.kind == "noise")
    moved = [seen.shown[end][i] - starts[i].image for i in real]
    square = sum(float(m.square().sum()) for m in moved) / sum(m.numel() for m in moved)
    rewards, from_noise = {}, {}
    for name, card in described.items():
        before, after = ([seen.values[step][name][i] for i in real] for step in (0, end))
        better = 1.0 if card["higher_is_better"] else -1.0
        gains = [better * (b - a) for a, b in zip(before, after, strict=True)]
        change = sum(after) / len(after) - sum(before) / len(before)
        rewards[name] = {
            "before": sum(before) / len(before),
            "after": sum(after) / len(after),
            "change": change,
            "gain": better * change,
            "in_scales": change / card["scale"],
            "of_range": change / (card["range"][1] - card["range"][0]) if card["range"] else None,
            "better": sum(gain > card["tie_band"] + 1e-9 for gain in gains),
            "worse": sum(gain < -card["tie_band"] - 1e-9 for gain in gains),
            "pictures": len(real),
        }
        from_noise[name] = {"before": seen.values[0][name][noise], "after": seen.values[end][name][noise]}
    return {
        "budget": round(walk[end - 1].budget * 255),
        "step": end,
        "change": {"linf": max(float(m.abs().max()) for m in moved), "rms": square**0.5},
        "rewards": rewards,
        "noise": from_noise,
    }


def _highest(
    begin: int, end: int, starts: Sequence[Start], card: Mapping[str, Any], seen: _Walk
) -> dict[str, float | int]:
    """Where the probed reward's mean, noise left out, was best within a budget's steps."""

    def mean(step: int) -> float:
        values = [x for x, start in zip(seen.values[step][card["label"]], starts, strict=True) if start.kind != "noise"]
        return sum(values) / len(values)

    better = 1.0 if card["higher_is_better"] else -1.0
    best = max((step for step in seen.values if begin < step <= end), key=lambda step: better * mean(step))
    return {"step": best, "after": mean(best), "gain": better * (mean(best) - mean(0))}


def _write_images(folder: Path, starts: Sequence[Start], walk: Sequence[Step], seen: _Walk) -> None:
    """`images/00-start.png`, `images/00-8.png`, ...: each start, and what it is at each budget."""
    for step, pictures in seen.shown.items():
        for i, picture in enumerate(pictures):
            name = f"{i:02d}-{round(walk[step - 1].budget * 255)}.png" if step else f"{i:02d}-start.png"
            buffer = io.BytesIO()
            to_pil(picture[None])[0].save(buffer, "PNG")
            write_bytes(folder / "images" / name, buffer.getvalue())
