"""Published weights of a reward: found on the hub or on disk, read without running code, loaded with nothing left over.

A checkpoint from `torch.save` is a pickle; it is read here and nowhere else, by torch's reader that builds tensors and
plain containers only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.data.references import why_not_loaded
from rewardtune.errors import RecipeError


def find_file(reference: str, file: str, *, revision: str | None, reward: str, option: str) -> Path:
    """A published file: `reference` is the file itself, a folder that holds `file`, or a hub id.

    `reward` and `option` name, in errors, who asks and which of its options the reference came from.
    Raises RecipeError when there is none.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / file).is_file():
            return path / file
        raise RecipeError(f"reward {reward!r}: {option} {reference!r} holds no {file}. Put it there, or name the file.")
    if reference.count("/") != 1 or reference.startswith((".", "~", "/")):
        raise RecipeError(
            f"reward {reward!r}: {option} {reference!r} is no file, no folder and no hub id (owner/name). "
            "Check the path."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(reference, file, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(
            f"reward {reward!r}: {file} of {option} {reference!r} cannot be fetched from the hub: "
            f"{why_not_loaded(error, reference)} Check the network and your token, or download it once and give the "
            f"file or its folder as {option}."
        ) from error


def download(url: str, sha256: str, *, reward: str, option: str) -> Path:
    """A file that is not on the hub, from its authors' address into torch's cache, once.

    Raises RecipeError when it cannot be fetched, when HF_HUB_OFFLINE forbids to, or when it is not the one meant.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:16]}-{url.rpartition('/')[2]}"
    way_out = f"Download {url} where there is a network, and give the file as {option}."
    if not path.is_file():
        from huggingface_hub.constants import HF_HUB_OFFLINE

        if HF_HUB_OFFLINE:
            raise RecipeError(f"reward {reward!r}: {path.name} is not there and HF_HUB_OFFLINE is set. {way_out}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise RecipeError(
                f"reward {reward!r}: {url} cannot be fetched: {' '.join(str(error).split())[:300]} {way_out}"
            ) from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise RecipeError(
            f"reward {reward!r}: {path} is damaged or another file. Delete it, so that it is fetched again."
        )
    return path


def read_weights(path: Path, *, reward: str, key: str | None = None) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU, of a .safetensors file or a checkpoint of `torch.save`.

    key: where the checkpoint holds them, e.g. "state_dict"; the whole of it when None.
    Raises RecipeError for a file that is damaged, holds anything but tensors, or lacks `key`.
    """
    try:
        found: Any
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch, zipfile and safetensors each raise their own
        raise RecipeError(
            f"reward {reward!r}: the weights {path} cannot be read: {' '.join(str(error).split())[:300]} The file is "
            "damaged, or holds more than tensors, which is not unpickled because that can run code. Fetch it again, or "
            f"where you trust it, make .safetensors of it once: `rewardtune rewards convert {reward} {path} --trust`."
        ) from error
    if key is not None and isinstance(found, Mapping) and path.suffix != ".safetensors":
        if key not in found:
            shown = ", ".join(map(str, list(found)[:5]))
            raise RecipeError(
                f"reward {reward!r}: {path} has no {key!r} (it has {shown}): weights of another model. {_other(reward)}"
            )
        found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise RecipeError(
            f"reward {reward!r}: {path} is not a table of tensors by name: weights of another model. {_other(reward)}"
        )
    return dict(found)


def _is_zip(path: Path) -> bool:
    """Whether the file is of torch.save's newer form, which alone can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, reward: str, source: object) -> None:
    """Give a module all its weights, and no others. Raises RecipeError naming what is missing, over or misshapen."""
    wanted = module.state_dict()
    check_keys(
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        reward=reward, source=source,
    )  # fmt: skip
    # a module that was built empty takes the file's own memory
    module.load_state_dict(dict(tensors), strict=True, assign=any(tensor.is_meta for tensor in wanted.values()))


def check_keys(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, reward: str, source: object
) -> None:
    """Raises RecipeError, with examples, unless both have the same names and shapes."""
    missing = [name for name in wanted if name not in found]
    over = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} {found[name]} for {wanted[name]}" for name in wanted if name in found and found[name] != wanted[name]
    ]
    told = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("left over", over), ("of another shape", misshapen))
        if names
    ]
    if told:
        raise RecipeError(
            f"reward {reward!r}: {source} holds the weights of another model: {'; '.join(told)}. {_other(reward)}"
        )


def check_all_there(model: Any, missing: Iterable[str], *, what: str) -> None:
    """After transformers' `from_pretrained`, which draws weights that its files lack at random, with a warning.

    missing: its `missing_keys`. what: whose files, for the message. Raises RecipeError; buffers may be missing.
    """
    gone = set(missing)
    lacking = [name for name, _ in model.named_parameters() if name in gone]
    if lacking:
        raise RecipeError(
            f"{what}: its files lack {len(lacking)} weights of a {model.config.model_type} model "
            f"({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}): they are another model's, or not all "
            "there. Fetch them again, or give the model that its config.json tells of."
        )


def _other(reward: str) -> str:
    return f"Give the file that the card names (`rewardtune rewards show {reward}`), or one of the same architecture."
