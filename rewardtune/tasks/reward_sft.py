"""Supervised training of a scorer's distribution on rated pictures: Z-Reward's SFT baseline, and the pocket student.

Rows come from `data.read_records`, the forward pass is `scorer/model.py`, targets and loss are `scorer/losses.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.data.images import open_image, to_tensor
from rewardtune.data.records import PreferenceGroup, RatedImage, read_records
from rewardtune.diffusion import lora
from rewardtune.errors import CheckFailed, DataError, RecipeError
from rewardtune.randomness import epoch_index
from rewardtune.recipe.sections import RewardSftRecipe
from rewardtune.scorer.evaluate import evaluate_groups, flat
from rewardtune.scorer.losses import distribution_cross_entropy, hard_target, histogram_target, two_hot_target
from rewardtune.scorer.model import Scorer, load_scorer, save_scorer
from rewardtune.scoring.objective import expectation
from rewardtune.types import Prompt, StepOutput

# every linear layer of the language model, of either kind of attention; the vision tower stays as it is
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv",
                "in_proj_z", "out_proj")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One rated picture. target: (D, K), NaN for a dimension that nobody rated."""

    image: Path
    prompt: Prompt
    target: Tensor


@dataclass(frozen=True)
class Batch:
    """images: B tensors (3, H, W); target: (B, D, K)."""

    images: list[Tensor]
    prompts: list[Prompt]
    target: Tensor


class RewardSft:
    """See `tasks.Task`. `held_out`: groups that `evaluate` reads at the end; `base`: the reference trained from."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        rows: Sequence[Row],
        held_out: Sequence[PreferenceGroup] = (),
        seed: int,
        base: str,
    ) -> None:
        if not rows:
            raise DataError("the records hold no scores, only preferences; reward_sft trains on scores.")
        self.scorer, self.rows, self.held_out, self.seed, self.base = scorer, rows, held_out, seed, base
        self.trainable: Mapping[str, nn.Module] = {"scorer": scorer.model}

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        rows = [self.rows[epoch_index(self.seed, "reward_sft/order", i, len(self.rows))] for i in indices]
        images = [to_tensor([open_image(row.image)])[0].to(self.scorer.device) for row in rows]
        target = torch.stack([row.target for row in rows]).to(self.scorer.device)
        return Batch(images, [row.prompt for row in rows], target)

    def step(self, batch: Batch) -> StepOutput:
        logits = self.scorer.logits(batch.images, batch.prompts)
        loss = distribution_cross_entropy(logits, batch.target)
        with torch.no_grad():
            metrics = self._errors(logits.softmax(-1), batch.target)
        return StepOutput(loss=loss, metrics=metrics)

    def samples(self) -> None:
        return None

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Figures of `rewardtune evaluate` on the held-out records, without intervals."""
        if not self.held_out:
            return {}
        return flat(evaluate_groups(self.scorer, self.held_out, resamples=0))

    @torch.no_grad()
    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """Write a scorer's folder in the dtype of the checkpoint trained from, adapters merged; then read it back.

        Raises CheckFailed when the files do not give the distributions of the weights that were written.
        """
        written = replace(self.scorer, model=_plain_copy(self.scorer))
        save_scorer(written, folder)
        facts = {**provenance, "base": self.base, "dtype": str(self.scorer.stored_dtype).removeprefix("torch.")}
        _stamp(folder, facts)
        images, prompts = self._probe()
        wanted = replace(written, model=written.model.to(torch.float32)).distribution(images, prompts)
        fresh = load_scorer(folder, device=self.scorer.device)
        difference = (fresh.distribution(images, prompts) - wanted).abs().max().item()
        if not difference < 1e-5:
            raise CheckFailed(
                f"the scorer exported to {folder} does not give its distributions when it is loaded again (largest "
                f"difference {difference:.2g}). The checkpoints of the run are untouched; please report this with the "
                "output of `rewardtune env`."
            )
        trained = self.scorer.distribution(images, prompts)
        levels = self.scorer.levels
        rounding = (expectation(trained, levels) - expectation(wanted, levels)).abs().max().item()
        if rounding > 0.25 * float(levels[1] - levels[0]):
            raise CheckFailed(
                f"storing the scorer as {facts['dtype']} moves its scores by up to {rounding:.2f}. Train from a "
                "checkpoint stored as float32 to export in float32."
            )
        (folder / "README.md").write_text(_card(self.scorer, facts, rows=len(self.rows), rounding=rounding))

    def _errors(self, predicted: Tensor, target: Tensor) -> dict[str, float]:
        """Mean absolute error of the expected score, per dimension and over all; dimensions nobody rated are absent."""
        levels = self.scorer.levels
        error = (expectation(predicted, levels) - expectation(target.to(predicted.dtype), levels)).abs()
        out = {"mae": error.nanmean().item()}
        for d, name in enumerate(self.scorer.dimensions):
            out[f"mae/{name}"] = error[:, d].nanmean().item()
        return {k: v for k, v in out.items() if math.isfinite(v)}

    def _probe(self) -> tuple[list[Tensor], list[Prompt]]:
        """The first few rows, fixed."""
        rows = self.rows[:4]
        return [to_tensor([open_image(r.image)])[0].to(self.scorer.device) for r in rows], [r.prompt for r in rows]


def build_reward_sft(recipe: RewardSftRecipe, *, device: str) -> RewardSft:
    """The task of a recipe: scorer loaded and thawed, records read and turned into targets."""
    section = recipe.scorer
    scorer = load_scorer(section.model, revision=section.revision, rubric=section.rubric, device=device)
    model: Any = scorer.model
    if section.lora is not None:
        if "modules" in section.lora.model_fields_set:
            raise RecipeError("scorer.lora.modules: a scorer is one module; leave `modules` out and name `targets`.")
        present = {path.rpartition(".")[2] for path, _ in model.named_modules() if "visual" not in path}
        targets = section.lora.targets or [t for t in LORA_TARGETS if t in present]
        rank = section.lora.rank
        lora.attach(
            {"scorer": model}, rank=rank, alpha=section.lora.alpha or rank, targets={"scorer": targets},
            seed=recipe.train.seed,
        )  # fmt: skip
    else:
        model.requires_grad_(True)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    make = target_maker(recipe.objective.target, scorer)
    held_out = read_records(recipe.data.held_out) if recipe.data.held_out else []
    return RewardSft(
        scorer, rows=rated_rows(read_records(recipe.data.records), make), held_out=held_out, seed=recipe.train.seed,
        base=section.model,
    )  # fmt: skip


def rated_rows(groups: Sequence[PreferenceGroup], make: Callable[[RatedImage], Tensor]) -> list[Row]:
    """One row per picture that has a score; pictures that only preferences mention are left out."""
    return [
        Row(image.image, group.prompt, make(image))
        for group in groups
        for image in group.images
        if image.scores or image.annotations
    ]


def target_maker(kind: str, scorer: Scorer) -> Callable[[RatedImage], Tensor]:
    """From a rated picture to its target (D, K), NaN for dimensions without a rating.

    `histogram` uses every annotator's score, and the two-hot target where only an aggregate is known.
    """
    levels, dimensions = scorer.levels.cpu(), scorer.dimensions

    def make(image: RatedImage) -> Tensor:
        single = torch.tensor([image.scores.get(d, math.nan) for d in dimensions])
        if kind == "hard":
            return hard_target(single, levels)
        if kind == "two-hot" or not image.annotations:
            return two_hot_target(single, levels)
        each = torch.tensor([[a.get(d, math.nan) for a in image.annotations] for d in dimensions])
        counted = histogram_target(each, levels)
        return torch.where(counted.isnan(), two_hot_target(single, levels), counted)

    return make


def _plain_copy(scorer: Scorer) -> nn.Module:
    """A model of the same class with adapters merged into the weights, in the stored dtype; the original is left."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = scorer.model
    added: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        layer: Any = module
        if isinstance(module, BaseTunerLayer):
            added[f"{path}.base_layer.weight"] = layer.get_delta_weight(lora.ADAPTER)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            whole = tensor.float() + added[name].float() if name in added else tensor
            state[name.replace(".base_layer.", ".")] = whole.to(scorer.stored_dtype)
    config = type(model.config).from_dict(model.config.to_dict())
    copy: nn.Module = type(model)._from_config(config, dtype=scorer.stored_dtype).to(scorer.device)
    copy.load_state_dict(state)
    return copy.requires_grad_(False).eval()


def _stamp(folder: Path, facts: Mapping[str, str]) -> None:
    """Put what the weights are into the metadata of each safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
        save_file(load_file(file), file, metadata={**metadata, **{f"rewardtune.{k}": str(v) for k, v in facts.items()}})
        # safetensors writes for the owner alone; an export is made to be handed on
        file.chmod(0o644)
    (folder / "rewardtune.json").write_text(json.dumps(dict(sorted(facts.items())), indent=1) + "\n")


def _card(scorer: Scorer, facts: Mapping[str, str], *, rows: int, rounding: float) -> str:
    import yaml

    front: dict[str, Any] = {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["rewardtune", "reward-model"],
    }  # fmt: skip
    if not facts["base"].startswith("pocket:") and not Path(facts["base"]).expanduser().exists():
        front["base_model"] = facts["base"]
    levels = ", ".join(f"{level.token} = {level.value:g}" for level in scorer.rubric.levels)
    table = "\n".join(f"| {k} | `{str(v)[:200]}` |" for k, v in sorted(facts.items()))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n# {facts.get('name', 'scorer')}\n\n"
        f"Reads an image and a prompt into a distribution over {len(scorer.rubric.levels)} levels ({levels}) for "
        f"{', '.join(scorer.dimensions)}, in one forward pass. Trained with rewardtune (`task: reward_sft`) from "
        f"`{facts['base']}` on {rows:,} rated pictures.\n\n"
        '```python\nimport rewardtune as rt\n\nreward = rt.load_reward("zreward", checkpoint="path/to/this/folder")\n'
        "score = reward.score(images, prompts)  # images (B, 3, H, W) in [0, 1]\n```\n\n"
        "`rubric.json` holds the question, the level tokens and where they are read. "
        f"Stored as {facts['dtype']}, which moved the scores of four probe pictures by {rounding:.3f} at most.\n\n"
        f"| | |\n| --- | --- |\n{table}\n"
    )
