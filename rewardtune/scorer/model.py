"""One forward pass of a vision-language model -> a distribution over the score levels for every dimension.

Used by `tasks/reward_sft.py`, `rewards/zreward.py` and `evaluate.py`; knows any model of the Qwen-VL kind that
transformers' `AutoModelForImageTextToText` loads.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rewardtune.backbones.weights import check_all_there
from rewardtune.data.references import resolve, why_not_loaded
from rewardtune.errors import DataError, RecipeError
from rewardtune.scorer.patches import Geometry, bounded, patchify, read_geometry
from rewardtune.scorer.rubric import FILE, Frame, Reading, Rubric, differences, load_rubric, reading, save_rubric
from rewardtune.training import runtime

FACTS = "rewardtune.json"
"""What an export says of its training; a folder that has it holds a trained scorer."""


@dataclass(frozen=True)
class Seen:
    """What the vision tower makes of B pictures, for rows that show one of them more than once.

    features: the model's own output for images, a tensor a picture. grid: (B, 3) of frames, rows and columns of
    patches. counts: image tokens of each.
    """

    features: Any
    grid: Tensor
    counts: list[int]

    def shown(self, which: Sequence[int]) -> dict[str, Any]:
        """The model's arguments about images for rows that show these, in the order in which they stand."""
        shown = copy.copy(self.features)
        shown.pooler_output = [self.features.pooler_output[i] for i in which]
        if getattr(self.features, "deepstack_features", None) is not None:
            shown.deepstack_features = [[layer[i] for i in which] for layer in self.features.deepstack_features]
        return {"mm_encoder_outputs": {"image": shown}, "image_grid_thw": self.grid[list(which)]}


@dataclass(frozen=True)
class Scorer:
    """A model with its tokenizer, its rubric, and the rubric in the tokenizer's ids."""

    model: nn.Module
    tokenizer: Any
    rubric: Rubric
    reading: Reading
    geometry: Geometry
    stored_dtype: torch.dtype
    """Dtype of the weights on disk; an export keeps it."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        return self.rubric.dimensions

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def levels(self) -> Tensor:
        """(K,) value of each level, on the model's device."""
        return torch.tensor(self.rubric.values, device=self.device)

    def logits(self, images: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(B, D, K) logits of the levels after the temperature, fp32 (fp64 for a model in fp64), with graph.

        images: in [0, 1], (B, 3, H, W) or B tensors (3, H, W); prompts: B strings.
        """
        assert len(images) == len(prompts), f"{len(images)} images for {len(prompts)} prompts"
        rows, grid = patchify(images, self.geometry)
        rows = rows.to(self.device)
        if torch.is_grad_enabled() and any(image.requires_grad for image in images):
            assert rows.requires_grad, "the pixels' gradient was cut on the way to the model"
        counts = (grid[:, 1] * grid[:, 2] // self.geometry.merge**2).tolist()
        ids, mask = self._tokens(prompts, counts)
        # Rows are padded on the left, so that the reads stand at the same places in each. Only these places go through
        # the output layer: all of them would cost tokens * vocabulary.
        keep = ids.shape[1] + torch.tensor(self.reading.positions, device=ids.device)
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == self.image_token).int(),
            pixel_values=rows,
            image_grid_thw=grid.to(ids.device),
            logits_to_keep=keep,
            use_cache=False,
        ).logits
        chosen = logits[..., list(self.reading.level_ids)]
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        return chosen / self.rubric.temperature

    def distribution(self, images: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(B, D, K) probabilities over the levels: softmax over the level tokens alone (Z-Reward, section 3)."""
        return self.logits(images, prompts).softmax(-1)

    def see(self, images: Tensor | Sequence[Tensor]) -> Seen:
        """Images in [0, 1], (B, 3, H, W) or B tensors (3, H, W), through the vision tower, each once; with graph."""
        patches, grid = patchify(images, self.geometry)
        grid, model = grid.to(self.device), cast(Any, self.model)
        features = model.get_image_features(patches.to(self.device), image_grid_thw=grid, return_dict=True)
        return Seen(features, grid, (grid[:, 1] * grid[:, 2] // self.geometry.merge**2).tolist())

    @property
    def image_token(self) -> int:
        token: int = self.model.config.image_token_id  # type: ignore[union-attr, assignment]
        return token

    def _tokens(self, prompts: Sequence[str], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = [self.tokens(self.reading.frame, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        return self.pad(rows)

    def tokens(self, frame: Frame, prompt: str, count: int, reference: int = 0) -> list[int]:
        """Ids of a template with a prompt and an image of `count` tokens, and the image beside it where there is one.

        Raises DataError when they are more than the model reads.
        """
        # `split_special_tokens`: a prompt that spells "<|im_end|>" stays text
        words = self.tokenizer.encode(frame.lead + str(prompt), add_special_tokens=False, split_special_tokens=True)
        fill = {"prompt": words, "image": [self.image_token] * count, "reference": [self.image_token] * reference}
        row = [*frame.pieces[0]]
        for slot, piece in zip(frame.slots, frame.pieces[1:], strict=True):
            row += [*fill[slot], *piece]
        limit = self.model.config.get_text_config().max_position_embeddings  # type: ignore[operator, union-attr]
        if len(row) > limit:
            raise DataError(
                f"image and prompt take {len(row)} tokens, and this scorer reads at most {limit}. Shorten the prompt: "
                f"{str(prompt)[:80]!r}..."
            )
        return row

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(B, L) ids padded on the left, and the mask of what is not padding."""
        return pad_left(rows, filler=self.tokenizer.pad_token_id or 0, device=self.device)


def pad_left(rows: Sequence[Sequence[int]], *, filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) ids padded on the left, and the mask of what is not padding."""
    length = max(map(len, rows))
    ids = torch.tensor([[filler] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@dataclass(frozen=True)
class VisionLanguageModel:
    """A frozen model of the Qwen-VL kind with its tokenizer, and how it cuts pictures."""

    model: nn.Module
    tokenizer: Any
    geometry: Geometry
    stored_dtype: torch.dtype
    """Dtype of the weights on disk."""
    folder: Path | None
    """Where the checkpoint's small files lie; None when a hub id offers none."""


def load_model(
    reference: str | Path,
    *,
    what: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> VisionLanguageModel:
    """A model from a folder, an export, `pocket:<name>` or a hub id; frozen, in eval mode.

    what: who asks for it, for messages. Raises RecipeError: no such model, not an image-text model of this kind, or
    weights that are damaged or another model's.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    path = resolve(str(reference))
    folder = _files(path, revision)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"{what} {str(reference)!r} does not load: {why_not_loaded(error, path)} Give the folder of an "
            "image-text model with its tokenizer, a scorer's export, pocket:<name> or a hub id."
        ) from error
    if not hasattr(config, "vision_config") or not hasattr(config.vision_config, "spatial_merge_size"):
        raise RecipeError(
            f"{what} {str(reference)!r} is a {config.model_type} model; it must be a Qwen-VL model (qwen3_5, qwen3_vl)."
        )
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # huggingface_hub, safetensors and transformers each raise their own
        raise RecipeError(
            f"{what} {str(reference)!r}: its weights do not load: {why_not_loaded(error, path)} The file is "
            "missing, damaged or of another model; fetch it again, or give a folder with config.json and safetensors."
        ) from error
    model, report = loaded
    check_all_there(model, report["missing_keys"], what=f"{what} {str(reference)!r}")
    return VisionLanguageModel(
        model=model.to(device).requires_grad_(False).eval(),
        tokenizer=tokenizer,
        geometry=read_geometry(config.vision_config, folder),
        stored_dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32,
        folder=folder,
    )


def load_scorer(
    reference: str | Path,
    *,
    what: str = "scorer",
    revision: str | None = None,
    rubric: str | Path | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    to_train: bool = False,
) -> Scorer:
    """A scorer from a folder, an export, `pocket:<name>` or a hub id; frozen, in eval mode.

    what: who asks for it, for messages. rubric: a file; the checkpoint's own `rubric.json` when None, and the shipped
    one where it has none. min_pixels, max_pixels: bounds of a picture's area, see `patches.bounded`. to_train: it will
    be trained with the rubric, which may then be another one than its own.

    Raises RecipeError: no such model, not an image-text model, weights that are damaged or another model's, levels that
    are not single tokens, or a rubric that is not the one that the checkpoint was trained with.
    """
    folder = _files(resolve(str(reference)), revision)
    chosen = _rubric(folder, rubric, who=f"{what} {str(reference)!r}", to_train=to_train)
    loaded = load_model(reference, what=what, revision=revision, dtype=dtype, device=device)
    trained = folder is not None and (folder / FACTS).is_file()
    return Scorer(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        rubric=chosen,
        reading=reading(chosen, loaded.tokenizer),
        geometry=bounded(
            loaded.geometry, min_pixels=min_pixels, max_pixels=max_pixels, trained=trained,
            who=f"{what} {str(reference)!r}",
        ),
        stored_dtype=loaded.stored_dtype,
    )  # fmt: skip


def _rubric(folder: Path | None, given: str | Path | None, *, who: str, to_train: bool) -> Rubric:
    """The rubric to read a checkpoint with. One that comes with a rubric of its own is read with that one: under
    another, the token that it learned for 1.5 might pass for 2, and nothing would show it. Training makes it fit."""
    own = load_rubric(folder) if folder is not None and (folder / FILE).is_file() else None
    chosen = load_rubric(given) if given is not None else own or load_rubric()
    trained = _trained_with(folder) or own
    odd = differences(trained, chosen) if trained is not None else []
    if odd and to_train and runtime.process()[0] == 0:
        print(f"{who} comes with another rubric: {'; '.join(odd)} differ. Training makes it fit the new one; its "
              "scores before that mean little.", file=sys.stderr)  # fmt: skip
    if odd and not to_train:
        file = given if given is not None else (folder / FILE if folder is not None else FILE)
        raise RecipeError(
            f"{who} is to be read with {file}, and was made for another rubric: {'; '.join(odd)} differ. Use the "
            "checkpoint's own (leave `rubric` out and its rubric.json as it was written), or train it with the new "
            "one: scorer.rubric in a recipe whose task is reward_sft, reward_gdso, reward_risd, ..."
        )
    return chosen


def _trained_with(folder: Path | None) -> Rubric | None:
    """The rubric that an export was trained with, which its rubric.json may be no longer; None in exports from before
    it was written down."""
    if folder is None or not (folder / FACTS).is_file():
        return None
    try:
        written = json.loads((folder / FACTS).read_text(encoding="utf-8")).get("rubric")
        return Rubric.model_validate_json(written) if written else None
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{folder / FACTS} is damaged ({str(error).splitlines()[0]}), so it does not say what the scorer was "
            "trained with. Export the run again, or fetch the folder again."
        ) from None


def save_scorer(scorer: Scorer, folder: Path) -> None:
    """Write a folder that `load_scorer` and plain transformers load. Adapters, if any, must be merged before."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    model: Any = scorer.model
    model.save_pretrained(folder, safe_serialization=True)
    scorer.tokenizer.save_pretrained(folder)
    cut = scorer.geometry
    Qwen2VLImageProcessorPil(
        patch_size=cut.patch,
        merge_size=cut.merge,
        temporal_patch_size=cut.temporal,
        image_mean=list(cut.mean),
        image_std=list(cut.std),
        size={"shortest_edge": cut.min_pixels, "longest_edge": cut.max_pixels},
    ).save_pretrained(folder)
    save_rubric(scorer.rubric, folder)


def _files(path: str, revision: str | None) -> Path | None:
    """Folder that holds the small files of a checkpoint; None when a hub id offers none of ours."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    found = None
    for name in (FILE, FACTS, "preprocessor_config.json"):
        try:
            found = Path(hf_hub_download(path, name, revision=revision)).parent
        except (HfHubHTTPError, OSError):
            continue
    return found
