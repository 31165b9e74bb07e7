"""Writing a trained scorer: weights in the dtype of the checkpoint trained from, rubric, provenance and card; then
reading it back. The tasks that train scorers end here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewardtune.data.images import read_tensors
from rewardtune.diffusion import lora
from rewardtune.errors import CheckFailed
from rewardtune.scorer.model import FACTS, Scorer, load_scorer, save_scorer
from rewardtune.scoring.objective import expectation

LARGE = 2_000_000_000
"""Parameters above which an export is checked in its stored dtype, for want of memory; else in float32 (ours)."""

_SCORES = """\
Reads an image and a prompt into a distribution over {count} levels ({levels}) for {dimensions}, in one forward pass. \
{trained}

```python
import rewardtune as rt

reward = rt.load_reward("zreward", checkpoint="path/to/this/folder")
score = reward.score(images, prompts)  # images (B, 3, H, W) in [0, 1]
```"""
_COMPARES = """\
Says of two images of one prompt how likely the first is the better one in a dimension ({dimensions}), in one forward \
pass. {trained} Its scores of single images were not trained.

```python
from rewardtune.scorer.comparison import load_comparer
from rewardtune.scorer.model import load_scorer

comparer = load_comparer(load_scorer("path/to/this/folder"))
# images, references (N, 3, H, W) in [0, 1]; dimensions: an index each
better = comparer.probability(images, references, prompts, dimensions)
```"""


@torch.no_grad()
def export_scorer(
    scorer: Scorer,
    folder: Path,
    provenance: Mapping[str, str],
    *,
    base: str,
    task: str,
    trained_on: str,
    probe: Sequence[tuple[Path, str]],
    compares: bool = False,
) -> None:
    """Write a scorer's folder, adapters merged; then read it back and score the probe's pictures.

    base: the reference trained from. task, trained_on: for the card. probe: (image, prompt) each. compares: the card
    says how two pictures are compared, which was trained, and not how one is scored. Raises CheckFailed when the files
    do not give the distributions of the weights that were written.

    Copies are made in main memory, one at a time: the device may hold no second one.
    """
    written = replace(scorer, model=_plain_copy(scorer))
    save_scorer(written, folder)
    facts = {**provenance, "base": base, "dtype": str(scorer.stored_dtype).removeprefix("torch."),
             "rubric": scorer.rubric.model_dump_json()}  # fmt: skip
    _stamp(folder, facts)
    images = read_tensors((path for path, _ in probe), device="cpu")
    prompts = [prompt for _, prompt in probe]
    large = sum(p.numel() for p in written.model.parameters()) > LARGE
    compute = scorer.stored_dtype if large else torch.float32
    wanted = replace(written, model=written.model.to(compute)).distribution(images, prompts)
    del written
    difference = (load_scorer(folder, dtype=compute).distribution(images, prompts) - wanted).abs().max().item()
    if not difference < 1e-5:
        raise CheckFailed(
            f"the scorer exported to {folder} does not give its distributions when it is loaded again (largest "
            f"difference {difference:.2g}). The checkpoints of the run are untouched; please report this with the "
            "output of `rewardtune env`."
        )
    trained = scorer.distribution(images, prompts).cpu()
    levels = scorer.levels.cpu()
    rounding = (expectation(trained, levels) - expectation(wanted, levels)).abs().max().item()
    if rounding > 0.25 * float(levels[1] - levels[0]):
        raise CheckFailed(
            f"storing the scorer as {facts['dtype']} moves its scores by up to {rounding:.2f}. Train from a "
            "checkpoint stored as float32 to export in float32."
        )
    use = (_COMPARES if compares else _SCORES).format(
        dimensions=", ".join(scorer.dimensions), count=len(scorer.rubric.levels),
        levels=", ".join(f"{level.token} = {level.value:g}" for level in scorer.rubric.levels),
        trained=f"Trained with rewardtune (`task: {task}`) from `{facts['base']}` on {trained_on}.",
    )  # fmt: skip
    card = _card(facts, use=use, rounding=rounding)
    (folder / "README.md").write_text(card)


def _plain_copy(scorer: Scorer) -> nn.Module:
    """A model of the same class with adapters merged into the weights, in the stored dtype and main memory; the
    original is left."""
    from accelerate import init_empty_weights
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = scorer.model
    added: dict[str, Any] = {}
    for path, module in model.named_modules():
        layer: Any = module
        if isinstance(module, BaseTunerLayer):
            added[f"{path}.base_layer.weight"] = layer
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            whole = tensor.float() + added[name].get_delta_weight(lora.ADAPTER).float() if name in added else tensor
            # a copy in any case: what is compared with must not change with the weights in training
            state[name.replace(".base_layer.", ".")] = whole.to("cpu", scorer.stored_dtype, copy=True)
    config = type(model.config).from_dict(model.config.to_dict())
    with init_empty_weights(include_buffers=False):
        copy: Any = type(model)._from_config(config, dtype=scorer.stored_dtype)
    copy.load_state_dict(state, assign=True)
    copy.tie_weights()
    found: nn.Module = copy.requires_grad_(False).eval()
    return found


def _stamp(folder: Path, facts: Mapping[str, str]) -> None:
    """Put what the weights are into the metadata of each safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
        save_file(load_file(file), file, metadata={**metadata, **{f"rewardtune.{k}": str(v) for k, v in facts.items()}})
    (folder / FACTS).write_text(json.dumps(dict(sorted(facts.items())), indent=1) + "\n")


def _card(facts: Mapping[str, str], *, use: str, rounding: float) -> str:
    import yaml

    front: dict[str, Any] = {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["rewardtune", "reward-model"],
    }  # fmt: skip
    if not facts["base"].startswith("pocket:") and not Path(facts["base"]).expanduser().exists():
        front["base_model"] = facts["base"]
    # the whole recipe and rubric are in rewardtune.json, and no line of a table
    table = "\n".join(f"| {k} | `{v}` |" for k, v in sorted(facts.items()) if k not in ("recipe", "rubric"))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n# {facts.get('name', 'scorer')}\n\n"
        f"{use}\n\n"
        "`rubric.json` holds the question, the level tokens and where they are read. "
        f"Stored as {facts['dtype']}, which moved the scores of four probe pictures by {rounding:.3f} at most.\n\n"
        f"| | |\n| --- | --- |\n{table}\n"
    )
