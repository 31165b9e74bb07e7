"""A vision-language model that is asked something about a picture, and the token that it would say next, with gradient.

For rewards that read an answer's probability. Any model of the Qwen-VL kind that transformers'
`AutoModelForImageTextToText` loads serves; patches and padding are those of `scorer/`, which reads its own rubrics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.backbones.frozen import freeze
from rewardtune.errors import DataError, RecipeError
from rewardtune.scorer.model import load_model, pad_left
from rewardtune.scorer.patches import Geometry, patchify
from rewardtune.scorer.rubric import single_token

IMAGE, PROMPT = "{image}", "{prompt}"


@dataclass(frozen=True)
class Template:
    """A text in the ids of one tokenizer.

    parts: ids, the place of the image (`{image}`), and texts that hold `{prompt}`. A prompt is put into the text around
    it before that is cut into tokens, as a tokenizer that gets the whole would cut it. tail: the plain text at the end,
    behind the last special token.
    """

    parts: tuple[tuple[int, ...] | str, ...]
    tail: str


@dataclass(frozen=True)
class Asked:
    """A model with its tokenizer, on behalf of a reward."""

    reward: str
    model: nn.Module
    tokenizer: Any
    geometry: Geometry

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def config(self) -> Any:
        return self.model.config

    def chat(self, question: str, *, answer: str = "") -> str:
        """The checkpoint's own chat template around an image and a question, without thinking; then `answer`'s start.

        Raises RecipeError when it has no such template, or one that shows no image.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise RecipeError(
                f"reward {self.reward!r}: the checkpoint has no chat template, so how it is asked is not known. Give "
                f"the option `template`: the whole text before the answer, with {IMAGE} where the picture stands."
            )
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text: str = self.tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        mark = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        if text.count(mark) != 1:
            raise RecipeError(
                f"reward {self.reward!r}: the checkpoint's chat template shows {text.count(mark)} images where one is "
                f"given. Give the option `template`: the whole text before the answer, with {IMAGE} in it."
            )
        return text.replace(mark, IMAGE) + answer

    def template(self, text: str) -> Template:
        """A text with `{image}` once and `{prompt}` at will, in which special tokens are written out."""
        if text.count(IMAGE) != 1:
            raise RecipeError(f"reward {self.reward!r}: template must hold {IMAGE} exactly once: {text[:200]!r}")
        special = self.tokenizer.get_added_vocab()
        marks = "|".join(re.escape(mark) for mark in sorted([*special, IMAGE], key=len, reverse=True))
        parts: list[tuple[int, ...] | str] = []
        pieces = re.split(f"({marks})", text)
        for piece in pieces:
            if piece == IMAGE or PROMPT in piece:
                parts.append(piece)
            elif piece:
                parts.append((special[piece],) if piece in special else tuple(self._ids(piece)))
        return Template(tuple(parts), pieces[-1])

    def answers(self, template: Template, words: Sequence[str]) -> list[int]:
        """The token of each answer. Raises RecipeError where one is not a token of its own behind the template."""
        unknown = self.tokenizer.unk_token_id
        found = [single_token(word, [template.tail], self._ids, unknown) for word in words]
        wrong = [repr(word) for word, token in zip(words, found, strict=True) if token is None]
        if wrong or len(set(found)) != len(found):
            said = f"{', '.join(wrong)} is not one token" if wrong else f"two of {', '.join(words)} are the same token"
            raise RecipeError(
                f"reward {self.reward!r}: where the answer stands, {said} in this checkpoint's tokenizer. Take answers "
                "that are one token each, with or without a space before them."
            )
        return [token for token in found if token is not None]

    def inputs(
        self, images: Tensor, prompts: Sequence[str], template: Template, *, behind: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What the model takes for images (B, 3, H, W) in [0, 1] and B prompts; rows are padded on the left.

        behind: ids that follow the template. Raises DataError for a prompt that is too long.
        """
        patches, grid = patchify(images, self.geometry)
        patches, grid = patches.to(self.device), grid.to(self.device)
        if torch.is_grad_enabled() and images.requires_grad:
            assert patches.requires_grad, "the pixels' gradient was cut on the way to the model"
        counts = (grid[:, 1] * grid[:, 2] // self.geometry.merge**2).tolist()
        rows = [[*self._row(template, p, count), *behind] for p, count in zip(prompts, counts, strict=True)]
        ids, mask = pad_left(rows, filler=self.tokenizer.pad_token_id or 0, device=self.device)
        return {
            "input_ids": ids, "attention_mask": mask, "pixel_values": patches, "image_grid_thw": grid,
            "mm_token_type_ids": (ids == self.config.image_token_id).int(),
        }  # fmt: skip

    def next_logits(self, images: Tensor, prompts: Sequence[str], template: Template) -> Tensor:
        """(B, V) logits of the token behind the template, fp32 (fp64 for a model in fp64), with graph."""
        logits: Tensor = self.model(
            **self.inputs(images, prompts, template), logits_to_keep=1, use_cache=False
        ).logits[:, -1]  # fmt: skip
        return logits if logits.dtype == torch.float64 else logits.float()

    def _row(self, template: Template, prompt: str, count: int) -> list[int]:
        row: list[int] = []
        for part in template.parts:
            if not isinstance(part, str):
                row += part
            elif part == IMAGE:
                row += [self.config.image_token_id] * count
            else:
                row += self._ids(part.replace(PROMPT, str(prompt)))
        limit = self.config.get_text_config().max_position_embeddings
        if len(row) > limit:
            raise DataError(
                f"reward {self.reward!r}: image and prompt take {len(row)} tokens, and the model reads at most {limit}."
                f" Shorten the prompt: {str(prompt)[:80]!r}..."
            )
        return row

    def _ids(self, text: str) -> list[int]:
        # `split_special_tokens`: a prompt that spells "<|im_end|>" stays text
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return found


def load_asked(
    reward: str,
    checkpoint: str,
    *,
    revision: str | None,
    dtype: str,
    rounding: bool,
    gradient_checkpointing: bool,
    device: str | torch.device,
) -> Asked:
    """A model and its tokenizer from a folder, `pocket:<name>` or a hub id, frozen. Raises RecipeError as `load_model`.

    dtype: of the weights, `float32` or `bfloat16`. rounding: see `Geometry`.
    """
    loaded = load_model(
        checkpoint, what=f"reward {reward!r}: checkpoint", revision=revision, dtype=getattr(torch, dtype), device=device
    )
    freeze(loaded.model, gradient_checkpointing=gradient_checkpointing)
    return Asked(reward, loaded.model, loaded.tokenizer, replace(loaded.geometry, rounding=rounding))
