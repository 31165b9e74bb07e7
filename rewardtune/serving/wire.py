"""What client and server of a served reward send each other: a safetensors file, whose metadata holds one JSON object.

Numbers travel in their own dtype, bit for bit; nothing that is received can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rewardtune.plugins import RewardCard
from rewardtune.types import Prompt, Score

PROTOCOL = 1
"""Raised when a server and a client of different versions could misunderstand each other."""
ENTRY = "rewardtune"
WEIGHTS = "weights/"
PARTS = "parts/"
LARGEST_HEADER = 16 * 2**20
"""Bytes of names and JSON. Ours: prompts of a batch are a few kilobytes."""


class Malformed(ValueError):
    """A message that is none of this protocol, and why."""


@dataclass(frozen=True)
class Message:
    """Tensors by name, and the JSON object beside them."""

    tensors: Mapping[str, Tensor]
    document: Mapping[str, Any]


def pack(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> bytes:
    """A message. Raises ValueError or TypeError where the document is not JSON."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        sent = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory
        mine = sent.untyped_storage().data_ptr()
        plain[name] = sent.clone() if mine in {t.untyped_storage().data_ptr() for t in plain.values()} else sent
    return save(plain, metadata={ENTRY: json.dumps(document, allow_nan=False, default=_plain)})


def unpack(raw: bytes) -> Message:
    """What `pack` made. Raises Malformed."""
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(LARGEST_HEADER, len(raw) - 8):
        raise Malformed("the body is no safetensors file, or cut off")
    try:
        header = json.loads(raw[8 : 8 + size])
        document = json.loads(header["__metadata__"][ENTRY])
        tensors = load(raw)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Malformed(f"the body is no safetensors file with JSON under {ENTRY!r} ({reason})") from None
    if not isinstance(document, dict):
        raise Malformed(f"the metadata's {ENTRY!r} is not a JSON object")
    return Message(tensors, document)


def pack_request(
    images: Tensor, prompts: Sequence[str], *, identity: str, weights: Mapping[str, Tensor] | None = None
) -> bytes:
    """Images (B, 3, H, W) with their prompts; for a gradient, also what each output weighs (its upstream gradient).

    weights: `value`, `distribution` or `parts/<name>` -> a tensor of that output's shape. Raises ValueError or
    TypeError for metadata of a prompt that is not JSON.
    """
    document = {
        "protocol": PROTOCOL,
        "identity": identity,
        "prompts": [str(prompt) for prompt in prompts],
        "metadata": [dict(getattr(prompt, "metadata", {})) for prompt in prompts],
    }
    return pack({"images": images, **{WEIGHTS + name: one for name, one in (weights or {}).items()}}, document)


def request_parts(message: Message) -> tuple[Tensor, list[Prompt], dict[str, Tensor]]:
    """Images, prompts and weights of a request. Raises Malformed, with what is expected."""
    images, texts = message.tensors.get("images"), message.document.get("prompts")
    beside = message.document.get("metadata")
    if (
        images is None
        or images.ndim != 4
        or images.shape[1] != 3
        or not images.is_floating_point()
        or 0 in images.shape
    ):
        found = "missing" if images is None else f"{tuple(images.shape)} of {images.dtype}"
        raise Malformed(f"'images' is {found}; expected (B, 3, H, W) of a floating dtype, values in [0, 1]")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) != len(images):
        count = len(texts) if isinstance(texts, list) else "no"
        raise Malformed(f"{len(images)} images came with {count} prompts; expected a list of one text an image")
    if beside is None:
        beside = [{}] * len(texts)
    if not isinstance(beside, list) or len(beside) != len(texts) or not all(isinstance(m, dict) for m in beside):
        raise Malformed("'metadata' must be a list of one object a prompt, or left out")
    prompts = [Prompt(text, found) for text, found in zip(texts, beside, strict=True)]
    weights = {n.removeprefix(WEIGHTS): t for n, t in message.tensors.items() if n.startswith(WEIGHTS)}
    return images, prompts, weights


def outputs(score: Score) -> dict[str, Tensor]:
    """The tensors of a score that may carry gradient, by the names under which they are weighted."""
    found = {"value": score.value}
    if score.distribution is not None:
        found["distribution"] = score.distribution
    return found | {PARTS + name: part for name, part in score.parts.items()}


def pack_score(score: Score, *, identity: str) -> bytes:
    tensors = outputs(score) | ({} if score.levels is None else {"levels": score.levels})
    document = {"protocol": PROTOCOL, "identity": identity, "dimensions": score.dimensions, "parts": list(score.parts)}
    return pack(tensors, document)


def score_of(message: Message, count: int) -> Score:
    """The score of `count` images. Raises Malformed where shapes do not fit."""
    tensors, dimensions, names = message.tensors, message.document.get("dimensions"), message.document.get("parts")
    value, distribution, levels = (tensors.get(name) for name in ("value", "distribution", "levels"))
    if value is None or value.shape != (count,):
        found = "no values" if value is None else f"values of shape {tuple(value.shape)}"
        raise Malformed(f"{found} for {count} images; it must be one each")
    if not isinstance(dimensions, list) or not isinstance(names, list):
        raise Malformed("the answer does not name its dimensions and parts")
    if (distribution is None) != (levels is None):
        raise Malformed("a distribution comes with the values of its levels")
    if distribution is not None and levels is not None and distribution.shape != (count, len(dimensions), len(levels)):
        raise Malformed(
            f"a distribution of shape {tuple(distribution.shape)} for {count} images, {len(dimensions)} dimensions and "
            f"{len(levels)} levels"
        )
    parts = {str(name): tensors.get(f"{PARTS}{name}") for name in names}
    wrong = [name for name, part in parts.items() if part is None or part.shape != (count,)]
    if wrong:
        raise Malformed(f"the parts {', '.join(wrong)} are not one number an image ({count} images)")
    known = {name: part for name, part in parts.items() if part is not None}
    return Score(value.float(), distribution, levels, tuple(map(str, dimensions)), known)


def identity_of(card: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A digest of what is served: card, options, and what is in the files and folders that options name.

    The same reward served again has the same one, a retrained checkpoint in the same folder another. Files are read
    whole, half a gigabyte a second or more.
    """
    bytes_of = {option: digest_of(value) for option, value in options.items() if option != "name" and _is_path(value)}
    content = json.dumps([card, options, bytes_of], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def digest_of(path: str) -> str:
    """sha256 over a file's bytes, or over names and bytes of all files of a folder."""
    root, found = Path(path).expanduser(), hashlib.sha256()
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if file.is_file():
            with file.open("rb") as opened:
                own = hashlib.file_digest(opened, "sha256").hexdigest()
            found.update(f"{file.relative_to(root).as_posix()}\0{own}\n".encode())
    return found.hexdigest()


def _is_path(value: Any) -> bool:
    """Whether an option is a file or folder of this machine; a question to a model is too long to be one."""
    try:
        return isinstance(value, str) and bool(value) and Path(value).expanduser().exists()
    except (OSError, RuntimeError):
        return False


def card_of(document: Any) -> RewardCard:
    """A card from its JSON; what only another version knows is left out. Raises Malformed."""
    try:
        return TypeAdapter(RewardCard).validate_python(document)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise Malformed(f"the card is none: {wrong}") from None


def _plain(value: Any) -> Any:
    """Mappings and sequences of other classes than JSON's."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
