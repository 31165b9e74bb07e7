"""`rewardtune rewards test`: does a loaded reward keep the contract of `plugins.Reward` on this machine?

Needs nothing but the reward: pictures are smooth noise, prompts those of the pocket world, which carry metadata too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rewardtune.data.images import to_pil, to_tensor
from rewardtune.data.records import read_prompts
from rewardtune.errors import DataError, RewardTuneError
from rewardtune.plugins import Reward
from rewardtune.randomness import generator
from rewardtune.scoring.checked import Checked, gradient_of
from rewardtune.types import Prompt, Score

COUNT = 3
SIZE = 64
"""Pixels a side where the card names no native resolution."""
REGROUPED = {"float32": 1e-4, "bfloat16": 0.05}
"""Ours: largest difference, relative to the card's scale, when the same image is scored in another batch, by the dtype
of the weights. Kernels round differently with another batch size (about 1e-6 a forward in float32, 1e-2 in bfloat16);
batch statistics would show as 1e-2 and more."""
SLOPE = 0.05
"""Ours: largest relative error of the gradient against central differences in fp32."""
SIZES = ((64, 64), (288, 160), (160, 288), (2048, 2048))
"""Heights and widths, from thumbnails to what the largest generators draw."""
ODD_PROMPTS = {
    "empty": "",
    "very long": "a red fox beside a very long list of things, " * 60,
    "emoji": "🦊🌈 👩‍👩‍👧‍👦 ❤️‍🔥",
    "right to left": "ثعلب أحمر بجانب מפתח כחול",
}
METADATA: Mapping[str, Sequence[Any]] = {
    "text": ("CAT", "REWARD", "42"),
    "objects": ({"cat": 1}, {"dog": 2}, {"cat": 1, "dog": 3}),
}
"""Examples of what rewards read beside a prompt and the pocket world's lack."""


@dataclass(frozen=True)
class Check:
    """One line of the answer. found: what was measured, in words. measured: the number behind it, if there is one."""

    name: str
    passed: bool
    found: str
    measured: float | None = None


@dataclass(frozen=True)
class Subject:
    """What the checks look at: a reward, pictures and prompts."""

    reward: Reward
    images: Tensor
    prompts: Sequence[Prompt]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Score:
        """Without a graph."""
        with torch.no_grad():
            return self.reward.score(images, prompts)

    @property
    def dtype(self) -> str:
        """Of the weights, where the reward's options say."""
        return str(getattr(getattr(self.reward, "config", None), "dtype", "float32"))

    @cached_property
    def jacobian(self) -> Tensor:
        """(B, B, 3, H, W): gradient of value i with respect to image j."""
        rows = []
        for index in range(COUNT):
            leaf = self.images.detach().clone().requires_grad_(True)
            rows.append(gradient_of(self.reward.card.name, self.reward.score(leaf, self.prompts).value[index], leaf))
        return torch.stack(rows)

    @property
    def gradient(self) -> Tensor:
        """(B, 3, H, W): of each value with respect to its own image."""
        return torch.diagonal(self.jacobian).movedim(-1, 0)


def check_reward(
    reward: Reward, *, device: str = "cpu", prompts: Sequence[Prompt] | None = None, images: Tensor | None = None
) -> list[Check]:
    """All checks that apply to this reward; a check that raises has failed.

    prompts: three or more, for a reward whose metadata the built-in ones lack. images: (3, 3, H, W), for a reward that
    has nothing to say of smooth noise.
    """
    subject = _subject(reward, device, prompts, images)
    return [_run(name, check, subject) for name, check in _checks(reward)]


def _subject(reward: Reward, device: str, prompts: Sequence[Prompt] | None, images: Tensor | None) -> Subject:
    chosen = probe_images(COUNT, size=reward.card.native_resolution or SIZE) if images is None else images[:COUNT]
    if not isinstance(reward, Checked):
        reward = Checked(reward)
    return Subject(reward, chosen.to(device), list(prompts[:COUNT]) if prompts else probe_prompts())


def check_loaded(
    name: str,
    options: dict[str, Any],
    *,
    device: str = "cpu",
    prompts: Sequence[Prompt] | None = None,
    images: Tensor | None = None,
) -> list[Check]:
    """`check_reward` of a reward by name, and once more with its weights in bfloat16 where it has that option."""
    from rewardtune import registry
    from rewardtune.scoring.reward_set import load_reward

    reward = load_reward(name, device=device, **options)
    checks = check_reward(reward, device=device, prompts=prompts, images=images)
    field = registry.rewards.load_class(name).Config.model_fields.get("dtype")
    if field is None or "dtype" in options or "bfloat16" not in str(field.annotation):
        return checks
    high = _subject(reward, device, prompts, images)
    wanted = high.score(high.images, high.prompts).value
    del reward, high

    def weights(low: Subject) -> Found:
        leaf = low.images.clone().requires_grad_(low.reward.card.differentiable)
        value = low.reward.score(leaf, low.prompts).value
        off = ((value - wanted).abs().max() / low.reward.card.scale).item()
        told, fine = _of_value(value)
        if low.reward.card.differentiable:
            slope = _of_slope(gradient_of(low.reward.card.name, value.sum(), leaf))
            told, fine = f"{told}, gradient {slope}", fine and slope == FINITE
        return fine, f"{told}; {off:.1g} off those in float32"

    second = load_reward(name, device=device, **options, dtype="bfloat16")
    return [*checks, _run("weights in bfloat16", weights, _subject(second, device, prompts, images))]


def probe_images(count: int, *, size: int) -> Tensor:
    """(count, 3, size, size) smooth pictures in [0.1, 0.9], away from the ends where clamping hides gradients."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator(0, "reward-checks"))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return 0.1 + 0.8 * smooth


def detailed_image(height: int, width: int) -> Tensor:
    """(1, 3, height, width): flat patches with hard edges and fine noise, which resizing has something to do with."""
    key = generator(1, "reward-checks")
    coarse = torch.rand(1, 3, 12, 12, generator=key)
    patches = torch.nn.functional.interpolate(coarse, size=(height, width), mode="nearest")
    return (patches + 0.05 * torch.randn(1, 3, height, width, generator=key)).clamp(0, 1)


def probe_prompts() -> list[Prompt]:
    """Three prompts of the pocket world, with examples of the metadata that some rewards read beside."""
    prompts = list(read_prompts("pocket:prompts/heldout")[:COUNT])
    return [
        Prompt(str(prompt), {**{key: examples[i] for key, examples in METADATA.items()}, **prompt.metadata})
        for i, prompt in enumerate(prompts)
    ]


Found = tuple[bool, str] | tuple[bool, str, float]
Checker = Callable[[Subject], Found]


def _checks(reward: Reward) -> Iterator[tuple[str, Checker]]:
    card = reward.card
    yield "one finite value an image", _values
    if card.dimensions:
        yield "distribution", _distribution
    yield "deterministic", _deterministic
    yield "independent of batch mates", _batch_mates
    yield "prompt is read as the card says", _reads_prompt
    yield "odd prompts", _odd_prompts
    yield "picture sizes", _sizes
    yield "images in bfloat16", _bfloat16
    yield "agrees with Pillow", _pillow
    if card.differentiable:
        yield "gradient reaches every image", _gradient
        yield "no gradient across images", _no_crosstalk
        if str(getattr(getattr(reward, "config", None), "dtype", "float32")) == "float32":
            yield "gradient equals finite differences", _finite_differences
    else:
        yield "no graph, as the card says", _no_graph


def _run(name: str, check: Checker, subject: Subject) -> Check:
    try:
        return Check(name, *check(subject))
    except RewardTuneError as error:
        return Check(name, False, str(error))
    except Exception as error:  # whatever a plug-in does wrong is the answer, not our crash
        return Check(name, False, f"raised {type(error).__name__}: {error}")


FINITE = "finite"


def _of_slope(slope: Tensor) -> str:
    if not bool(torch.isfinite(slope).all()):
        return "not finite"
    return FINITE if bool(slope.any()) else "zero everywhere"


def _of_value(value: Tensor) -> tuple[str, bool]:
    """In words, and whether they are good ones."""
    if value.dtype != torch.float32:
        return f"value of {value.dtype} where float32 is expected", False
    fine = bool(torch.isfinite(value).all())
    return f"value {FINITE if fine else 'not finite'}", fine


def _values(at: Subject) -> Found:
    value = at.score(at.images, at.prompts).value
    if value.shape != (COUNT,) or value.dtype != torch.float32:
        return False, f"shape {tuple(value.shape)} of {value.dtype} for {COUNT} images; expected ({COUNT},) of float32"
    shown = ", ".join(f"{number:.4g}" for number in value.tolist())
    if not bool(torch.isfinite(value).all()):
        return False, f"values {shown}"
    if at.reward.card.range is not None:
        low, high = at.reward.card.range
        if bool((value < low - 1e-4).any() or (value > high + 1e-4).any()):
            return False, f"values {shown} leave the card's range {low:g} to {high:g}"
    return True, f"values {shown}"


def _distribution(at: Subject) -> Found:
    score = at.score(at.images, at.prompts)
    if score.distribution is None or score.levels is None:
        return False, "the card names dimensions, and there is no distribution"
    if score.dimensions != at.reward.card.dimensions:
        return False, f"dimensions {score.dimensions}; the card has {at.reward.card.dimensions}"
    expected = (COUNT, len(score.dimensions), len(score.levels))
    if tuple(score.distribution.shape) != expected:
        return False, f"shape {tuple(score.distribution.shape)}; expected {expected}"
    off = (score.distribution.sum(-1) - 1).abs().max().item()
    rising = bool((score.levels.diff() > 0).all())
    fine = off < 1e-4 and rising and bool((score.distribution >= 0).all())
    return fine, f"rows sum to 1 within {off:.1g}, levels {'rise' if rising else 'do not rise'}"


def _deterministic(at: Subject) -> Found:
    first, second = (at.score(at.images, at.prompts).value for _ in range(2))
    return torch.equal(first, second), f"largest difference of two calls {(first - second).abs().max():.2g}"


def _batch_mates(at: Subject) -> Found:
    together = at.score(at.images, at.prompts).value
    alone = torch.cat([at.score(at.images[i : i + 1], at.prompts[i : i + 1]).value for i in range(COUNT)])
    reverse = list(range(COUNT))[::-1]
    turned = at.score(at.images[reverse], [at.prompts[i] for i in reverse]).value[reverse]
    off = max((together - alone).abs().max().item(), (together - turned).abs().max().item()) / at.reward.card.scale
    bound = REGROUPED[at.dtype]
    return off <= bound, f"alone, together and in another order differ by {off:.2g} (at most {bound:g})"


def _reads_prompt(at: Subject) -> Found:
    own = at.score(at.images, at.prompts).value
    others = [at.score(at.images, [*at.prompts[i:], *at.prompts[:i]]).value for i in range(1, COUNT)]
    changed, card = any(not torch.equal(own, other) for other in others), at.reward.card
    found = "other prompts change the value" if changed else "other prompts change nothing"
    if card.needs_prompt and not changed and not card.differentiable:
        return True, f"{found} on these pictures, which proves nothing of a reward that counts"
    return changed == card.needs_prompt, f"{found}; needs_prompt is {card.needs_prompt}"


def _odd_prompts(at: Subject) -> Found:
    """Each as it is first seen and again, when what was kept of it answers. Too long a prompt may be refused."""
    image, metadata = at.images[:1], at.prompts[0].metadata
    first: dict[str, Tensor] = {}
    told = []
    for kind, text in ODD_PROMPTS.items():
        try:
            first[kind] = at.score(image, [Prompt(text, metadata)]).value
        except DataError as error:
            if kind != "very long":
                return False, f"{kind}: {error}"
            told.append(f"{kind}: refused")
    again = {kind: at.score(image, [Prompt(ODD_PROMPTS[kind], metadata)]).value for kind in first}
    endless = [kind for kind, value in first.items() if not bool(torch.isfinite(value).all())]
    changed = [kind for kind in first if not torch.equal(first[kind], again[kind])]
    if endless or changed:
        return False, f"not finite for {endless or 'none'}; another value when seen again for {changed or 'none'}"
    return True, "; ".join([f"{', '.join(first)}: finite, and the same when seen again", *told])


def _sizes(at: Subject) -> Found:
    """A single picture of each size; the gradient too of one that is not square."""
    for height, width in SIZES:
        image = detailed_image(height, width).to(at.images)
        value = at.score(image, at.prompts[:1]).value
        if value.shape != (1,) or not bool(torch.isfinite(value).all()):
            return False, f"{width} x {height}: {value.tolist()}"
    found = ", ".join(f"{width} x {height}" for height, width in SIZES)
    if at.reward.card.differentiable:
        leaf = detailed_image(*SIZES[1]).to(at.images).requires_grad_(True)
        slope = _of_slope(gradient_of(at.reward.card.name, at.reward.score(leaf, at.prompts[:1]).value.sum(), leaf))
        return slope == FINITE, f"{found}; gradient where not square {slope}"
    return True, found


def _bfloat16(at: Subject) -> Found:
    leaf = at.images.bfloat16().requires_grad_(at.reward.card.differentiable)
    value = at.reward.score(leaf, at.prompts).value
    rounded = at.score(leaf.detach().float(), at.prompts).value
    told, fine = _of_value(value)
    if at.reward.card.differentiable:
        slope = _of_slope(gradient_of(at.reward.card.name, value.sum(), leaf))
        told, fine = f"{told}, gradient {slope}", fine and slope == FINITE
    off = ((value - rounded).abs().max() / at.reward.card.scale).item()
    return fine and off <= 0.01, f"{told}; {off:.1g} off the same pixels in float32"


def _pillow(at: Subject) -> Found:
    """Our resizing of float pixels against a file's bytes resized by Pillow. Without a native resolution: the bytes."""
    from PIL import Image

    card = at.reward.card
    native = card.native_resolution
    side = int(1.7 * native) if native else 4 * SIZE
    picture = to_pil(detailed_image(side, side))[0]
    if native:
        picture = picture.resize((native, native), Image.Resampling.BICUBIC)
    reference = at.score(to_tensor([picture]).to(at.images), at.prompts[:1]).value
    ours = at.score(detailed_image(side, side).to(at.images), at.prompts[:1]).value
    off = ((ours - reference).abs() / card.scale).item()
    what = f"{side} x {side} to {native} x {native}" if native else "bytes alone"
    bound = card.pillow_difference
    allowed = f"at most {bound:g}" if bound is not None else "no bound: not differentiable"
    return bound is None or off <= bound, f"{what}: {off:.1g} of the scale ({allowed})", off


def _gradient(at: Subject) -> Found:
    norms = [block.norm().item() for block in at.gradient]
    shown = ", ".join(f"{norm:.2g}" for norm in norms)
    return all(0 < norm < float("inf") for norm in norms), f"norms {shown}"


def _no_crosstalk(at: Subject) -> Found:
    others = [at.jacobian[i, j] for i in range(COUNT) for j in range(COUNT) if i != j]
    largest = max(block.abs().max().item() for block in others)
    return largest == 0.0, f"largest entry {largest:.2g} (must be exactly 0)"


def _finite_differences(at: Subject) -> Found:
    """Along the gradient's own direction, at the best of four step lengths: too short drowns in rounding."""
    gradient = at.gradient
    if empty := [i for i, block in enumerate(gradient) if not bool(block.any())]:
        return False, f"the gradient of image {', '.join(map(str, empty))} is zero: nothing to compare"
    direction = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    slope = (gradient * direction).sum(dim=(1, 2, 3))
    errors = []
    for step in (1e-2, 3e-3, 1e-3, 3e-4):
        up, down = (at.score(at.images + sign * step * direction, at.prompts).value for sign in (1, -1))
        errors.append(((up - down) / (2 * step) - slope).abs() / slope.abs())
    worst = torch.stack(errors).amin(dim=0).max().item()
    return worst <= SLOPE, f"relative error {worst:.2g} (at most {SLOPE:g})"


def _no_graph(at: Subject) -> Found:
    value = at.reward.score(at.images.detach().clone().requires_grad_(True), at.prompts).value
    found = "carries a graph although the card says it is not differentiable" if value.requires_grad else "none"
    return not value.requires_grad, found
