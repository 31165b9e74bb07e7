"""`rewardtune rewards new`: a reward that works, and its test, to be changed into one's own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated

import typer

from rewardtune.cli.command import Json, command, show, show_json
from rewardtune.cli.lists import rewards
from rewardtune.errors import RecipeError

REWARD = '''\
"""`@NAME@`: how near a picture's colours are to those that its prompt names.

A reward that works as it stands; CHANGE marks what is yours to write. The contract is in rewardtune/plugins.py, the
ways to use it are in docs/your-own-reward.md. `pytest test_@MODULE@.py` checks it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field

import rewardtune as rt
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:  # heavy packages are imported where they are used, so that `rewards list` stays quick
    import torch
    from torch import Tensor

    from rewardtune.types import Score

# CHANGE: whatever your reward knows. Here: red, green and blue of each colour, in [0, 1].
COLOURS = {
    "red": (0.85, 0.15, 0.15), "orange": (0.95, 0.55, 0.15), "yellow": (0.95, 0.85, 0.2), "green": (0.2, 0.65, 0.3),
    "blue": (0.2, 0.35, 0.85), "purple": (0.5, 0.25, 0.65), "pink": (0.95, 0.6, 0.75), "brown": (0.5, 0.35, 0.2),
    "black": (0.1, 0.1, 0.1), "grey": (0.5, 0.5, 0.5), "white": (0.95, 0.95, 0.95),
}  # fmt: skip


@rt.register_reward("@NAME@")
class @TITLE@:
    """The loaded reward."""

    card = RewardCard(
        name="@NAME@",
        # CHANGE: one sentence; `rewards show` prints it.
        summary="how near the picture's pixels are to the colours that the prompt names",
        # CHANGE: False where `score` returns no graph (counts, files, services). Such a reward judges and cannot train.
        differentiable=True,
        # CHANGE: False where the picture alone decides.
        needs_prompt=True,
        # CHANGE: smallest and largest value, or None. Add `higher_is_better=False` for a distance or a loss.
        range=(0.0, 1.0),
        # CHANGE: the difference between two pictures that is worth as much as 1 of another reward that is mixed in.
        scale=0.1,
        # CHANGE: the side that pictures are resized to before your network sees them; None where any size will do.
        native_resolution=None,
        # CHANGE: the licences of this file and of the weights that it loads ("none" where it loads none).
        licence_code="ours",
        licence_weights="none",
        # CHANGE: what must be importable, e.g. ("transformers",), and each model with the commit that you load.
        requires=(),
        models={},
        # CHANGE: keys that every prompt's metadata must have beside its text, e.g. ("objects",).
        metadata=(),
        # CHANGE: where the idea and the numbers are from.
        reference="",
    )

    class Config(Options):
        """What a recipe may write under `options:`; what is not here is refused."""

        # CHANGE: a field an option, with the line below it as its help. A checkpoint would be `checkpoint: str`.
        grey: float = Field(default=0.5, ge=0.0, le=1.0)
        """What is wanted where a prompt names no colour: this grey, 0 black, 1 white."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """CHANGE: load the network here, once, onto `device`, frozen: `.eval().requires_grad_(False)`."""
        return cls(config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """One number an image. images: (B, 3, H, W) float32 in [0, 1], with graph while training. prompts: B strings.

        CHANGE: compute in torch from `images` to `value`, with nothing detached and nothing shared between images: no
        statistics over the batch, no pictures of PIL on the way. rewardtune checks shapes, ranges and finiteness.
        """
        from rewardtune.types import Score

        wanted = images.new_tensor([self.wanted(prompt) for prompt in prompts])[:, :, None, None]
        return Score(value=1 - (images - wanted).square().mean((1, 2, 3)))

    def wanted(self, prompt: str) -> list[float]:
        """Mean of the colours that a prompt names."""
        named = [COLOURS[word] for word in re.findall("[a-z]+", prompt.lower()) if word in COLOURS]
        return [sum(channel) / len(named) for channel in zip(*named, strict=True)] if named else [self.config.grey] * 3
'''

TEST = '''\
"""`@NAME@` keeps the contract, and says what it should. `pytest test_@MODULE@.py`"""

from pathlib import Path

import pytest
import torch

import rewardtune as rt
from rewardtune.registry import load_plugin
from rewardtune.scoring.checks import check_loaded

load_plugin(str(Path(__file__).with_name("@MODULE@.py")))
# CHANGE: what your reward needs to be loaded, e.g. {"checkpoint": "tests/tiny"}: small random weights will do here,
# and `rewardtune rewards test` runs the same checks with the real ones.
OPTIONS = {}


def test_it_keeps_the_contract():
    # Gradients reach each image and no other, no value depends on the rest of the batch, sizes, precision, odd prompts.
    # CHANGE: `prompts=` and `images=` where it needs metadata, or has nothing to say of smooth noise.
    checks = check_loaded("@NAME@", OPTIONS)
    failed = [f"{check.name}: {check.found}" for check in checks if not check.passed]
    assert not failed, "\\n".join(failed)


def test_a_value_by_hand():
    # CHANGE: one value that you can work out on paper. Black where white (0.95) is wanted: 1 - 0.95 squared.
    score = rt.load_reward("@NAME@", **OPTIONS).score(torch.zeros(1, 3, 8, 8), ["a white door"])
    assert score.value.tolist() == pytest.approx([1 - 0.95**2])


def test_it_tells_better_from_worse():
    # CHANGE: a pair that people would not argue about.
    red, blue = torch.zeros(2, 3, 8, 8)
    red[0], blue[2] = 0.9, 0.9
    value = rt.load_reward("@NAME@", **OPTIONS).score(torch.stack([red, blue]), ["a red door"] * 2).value
    assert value[0] > value[1]
'''


@command(rewards, "new")
def rewards_new(
    name: Annotated[str, typer.Argument(help="What recipes will call it: words-with-hyphens.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where to; the current folder by default.")
    ] = Path("."),
    as_json: Json = False,
) -> None:
    """Write a reward that works, with comments where to change it, and its test."""
    module = check_name(name)
    title = "".join(word.capitalize() for word in name.split("-"))
    words = {"@NAME@": name, "@MODULE@": module, "@TITLE@": title if title.endswith("Reward") else f"{title}Reward"}
    files = {out / f"{module}.py": REWARD, out / f"test_{module}.py": TEST}
    there = [str(file) for file in files if file.exists()]
    if there:
        raise RecipeError(
            f"{' and '.join(there)}: already there, and nothing is overwritten. Give another name, or --out FOLDER."
        )
    out.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        for mark, word in words.items():
            text = text.replace(mark, word)
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    reward, test = map(str, files)
    if as_json:
        show_json({"name": name, "reward": reward, "test": test})
        return
    show(reward)
    show(test)
    show(f"now: rewardtune rewards test {name} --plugin {reward}")


def check_name(name: str) -> str:
    """The module's name for a reward's. Raises RecipeError for a name that recipes, Python or another reward refuse."""
    from rewardtune import registry

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise RecipeError(
            f"reward name {name!r}: write words of small letters and digits with hyphens between them, as colour-match."
        )
    if name in registry.rewards.names():
        raise RecipeError(
            f"reward {name!r} is there already ({registry.rewards.source(name)}), and one name means one reward. Give "
            "another name."
        )
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module)
    if found is not None and found.has_location and Path(str(found.origin)).resolve().parent != Path.cwd():
        raise RecipeError(
            f"reward name {name!r}: Python has a module {module}, which the file {module}.py would hide from programs "
            f"that start beside it. Give another name, such as our-{name}."
        )
    return module
