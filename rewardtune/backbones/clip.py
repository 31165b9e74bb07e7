"""CLIP's two towers as rewards need them: image features with gradient in the pixels, text features kept per prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewardtune.backbones.pixels import CLIP_MEAN, CLIP_STD, normalise, shorter_side
from rewardtune.backbones.weights import check_keys
from rewardtune.data.images import as_bytes
from rewardtune.data.references import why_not_loaded
from rewardtune.errors import RecipeError

KEPT = 20_000
"""Ours: prompts whose text features are kept, 80 MB of them at a width of 1024."""
ROWS, LENGTHS = 2, (24, 48)
"""Ours: the shape in which new prompts are read, so many at a time, each at the least of these lengths that holds it or
at the tower's own. Two of 24 tokens take a CPU as long as one: the time goes into fetching the weights."""


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), bit for bit transformers' own.

    Without gradient it works in the memory of x, which nothing reads after a block's first layer, and on a CPU piece by
    piece through a core's cache: fresh memory costs more than the arithmetic. 7 % of ViT-L/14's time.
    """

    PIECE = 1 << 17
    """Ours: numbers a thread takes at once; with what becomes of them half of a usual second cache in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept. Overwrites x where no gradient is asked for."""
        if torch.is_grad_enabled() and x.requires_grad:
            return x * torch.sigmoid(1.702 * x)
        if x.device.type != "cpu" or not x.is_contiguous():
            return x.mul_(torch.mul(x, 1.702).sigmoid_())
        piece = self.PIECE * torch.get_num_threads()
        gate = x.new_empty(min(piece, x.numel()))
        for part in x.view(-1).split(piece):
            part.mul_(torch.mul(part, 1.702, out=gate[: len(part)]).sigmoid_())
        return x


class ClassToken(nn.Module):
    """The vision tower's last block, for the class token alone: nothing else of what it gives is read.

    The token looks at all patches; its query, projection and MLP are those of one token instead of 257, which saves 3 %
    of ViT-L/14's time, forward and backward.
    """

    def __init__(self, block: Any) -> None:
        """block: transformers' `CLIPEncoderLayer`."""
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, 1, D). What else the tower gives its blocks says how attention is to be reported."""
        block, attention = self.block, self.block.self_attn
        seen = block.layer_norm1(hidden_states)
        query, key, value = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in (attention.q_proj(seen[:, :1]), attention.k_proj(seen), attention.v_proj(seen))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        first = hidden_states[:, :1] + attention.out_proj(mixed)
        found: Tensor = first + block.mlp(block.layer_norm2(first))
        return found


class Clip:
    """transformers' `CLIPModel`, frozen, with its tokenizer.

    fit: (B, 3, H, W), size -> (B, 3, size, size), how a picture is brought to the tower's size. after: what is done to
    the resized pixels, which overshoot [0, 1] at edges; Pillow cuts that off.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        fit: Callable[[Tensor, int], Tensor] = shorter_side,
        after: Literal["clamp", "bytes", "nothing"] = "clamp",
    ) -> None:
        from transformers.activations import QuickGELUActivation

        for module in list(model.modules()):
            for name, part in module.named_children():
                if isinstance(part, QuickGELUActivation):
                    setattr(module, name, QuickGelu())
        blocks = model.vision_model.encoder.layers
        if not isinstance(blocks[-1], ClassToken):
            blocks[-1] = ClassToken(blocks[-1])
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.fit, self.after = tokenizer, fit, after
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def resolution(self) -> int:
        """Pixels a side of what the vision tower sees."""
        size: int = self.model.config.vision_config.image_size
        return size

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised, float32."""
        seen = self.fit(images.float(), self.resolution)
        if self.after != "nothing":
            seen = as_bytes(seen) if self.after == "bytes" else seen.clamp(0, 1)
        return normalise(seen, CLIP_MEAN, CLIP_STD)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32 of unit length, with graph where the images have one."""
        pixels = self.pixels(images).to(self.model.visual_projection.weight.dtype)
        return functional.normalize(_embedding(self.model.get_image_features(pixel_values=pixels)).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) float32 of unit length, without graph; the same bit for bit whatever comes with a prompt.

        What a matrix product rounds to depends on its shape. So a new prompt's shape is its own affair: it is padded to
        one of a few lengths and read in a block of `ROWS` such prompts, or beside itself where others are lacking. The
        tower is causal and reads the first end token, so padding changes nothing but time. What exceeds its 77 tokens
        is cut off.
        """
        asked = [str(prompt) for prompt in prompts]
        found = {prompt: self._texts[prompt] for prompt in asked if prompt in self._texts}
        found |= self._read([prompt for prompt in dict.fromkeys(asked) if prompt not in found])
        for prompt in asked:
            self._texts[prompt] = found[prompt]
            self._texts.move_to_end(prompt)
        while len(self._texts) > KEPT:
            self._texts.popitem(last=False)
        return torch.stack([found[prompt] for prompt in asked])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) cosine of each image and its prompt, float32 in [-1, 1]."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def _read(self, prompts: list[str]) -> dict[str, Tensor]:
        """Each prompt and its features, by the tower."""
        if not prompts:
            return {}
        longest = self.model.config.text_config.max_position_embeddings
        lengths = (*(length for length in LENGTHS if length < longest), longest)
        alike: dict[int, list[tuple[str, list[int]]]] = {length: [] for length in lengths}
        words = self.tokenizer(prompts, truncation=True, max_length=longest).input_ids
        for prompt, ids in zip(prompts, words, strict=True):
            length = next(length for length in lengths if len(ids) <= length)
            alike[length].append((prompt, ids + ids[-1:] * (length - len(ids))))
        found: dict[str, Tensor] = {}
        for rows in alike.values():
            for start in range(0, len(rows), ROWS):
                block = rows[start : start + ROWS]
                filled = [ids for _, ids in (*block, *[block[-1]] * (ROWS - len(block)))]
                ids = torch.tensor(filled, device=self.model.text_projection.weight.device)
                features = functional.normalize(_embedding(self.model.get_text_features(input_ids=ids)).float(), dim=-1)
                # clones, or each would hold on to its whole block
                found |= {prompt: row.clone() for (prompt, _), row in zip(block, features, strict=False)}
        return found


def _embedding(out: Any) -> Tensor:
    """What `get_*_features` returns: a tensor before transformers 5, an output with `pooler_output` since."""
    found: Tensor = getattr(out, "pooler_output", out)
    return found


def load_model(reference: str, *, revision: str | None, dtype: str, device: str | torch.device, reward: str) -> Any:
    """A `CLIPModel` from a folder or a hub id, from safetensors. Raises RecipeError when it is none, or not whole."""
    from transformers import AutoConfig, CLIPModel

    where = f"reward {reward!r}: model {reference!r}"
    try:
        config = AutoConfig.from_pretrained(reference, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"{where} does not load: {why_not_loaded(error, reference)} Give a folder with config.json, or a hub id."
        ) from error
    if config.model_type != "clip":
        raise RecipeError(f"{where} is a {config.model_type} model; this reward stands on CLIP's.")
    try:
        loaded: Any = CLIPModel.from_pretrained(
            reference, revision=revision or "main", dtype=getattr(torch, dtype), use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # huggingface_hub, safetensors and transformers each raise their own
        raise RecipeError(
            f"{where}: its weights do not load: {why_not_loaded(error, reference)} The file is missing, damaged "
            "or of another model; fetch it again, or give a folder with config.json and model.safetensors."
        ) from error
    model, report = loaded
    over = {name for name in report["unexpected_keys"] if not name.endswith("position_ids")}
    found = {
        name: tuple(value.shape) for name, value in model.state_dict().items() if name not in report["missing_keys"]
    }
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_keys(wanted, found | dict.fromkeys(over, ()), reward=reward, source=f"model {reference!r}")
    return model.to(device)


def load_tokenizer(reference: str, *, revision: str | None, reward: str) -> Any:
    """CLIP's tokenizer from a folder or a hub id. Raises RecipeError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(reference, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"reward {reward!r}: tokenizer {reference!r} does not load: {why_not_loaded(error, reference)} Give a "
            "folder with tokenizer.json, or a hub id."
        ) from error
