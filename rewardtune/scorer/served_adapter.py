"""A reasoner's LoRA adapter on a vLLM server: written where both see it, and loaded while the server runs.

docs.vllm.ai/en/stable/features/lora, "Dynamically serving LoRA Adapters"; files as peft writes and loads them. Written
against vLLM 0.33. `remote_rollouts.py` calls it when the weights have changed.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.diffusion import lora
from rewardtune.errors import DataError, DiskError, RecipeError, RewardTuneError
from rewardtune.serving.connection import Connection, Dropped, Refused
from rewardtune.training import runtime, shard

NAME = "rewardtune"
START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank {rank} --enable-scale-out"


def load(line: Connection, model: Any, folder: Path, *, step: int) -> str:
    """Give the server the model's adapter as it is now, and take the former one from it; its name there.

    folder: this run's own, the memory of what the server has, also after an interruption. All processes must call this;
    the main one writes and asks while the others wait. Raises RecipeError, DataError or DiskError in all of them.
    """
    weights = _weights(model)
    return _in_main_process(lambda: _changed_over(line, model.peft_config[lora.ADAPTER], weights, folder, step))


def _changed_over(line: Connection, config: Any, weights: Mapping[str, Tensor], folder: Path, step: int) -> str:
    tensors = {name: value.float().cpu().contiguous() for name, value in weights.items()}
    # A name stands for these weights alone, so that `load_inplace` is of no use: under a name that it knows, vLLM may
    # take the former weights' keys and values from its prefix cache (issues 42125 and 30931).
    content = hashlib.sha256(str(folder).encode())
    for key, value in sorted(tensors.items()):
        content.update(f"{key} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    name = f"{NAME}-{step:06d}-{content.hexdigest()[:12]}"
    try:
        former = [path for path in folder.glob(f"{NAME}-*") if path.name != name]
        _write(folder / name, config, tensors)
    except OSError as error:
        raise DiskError(f"the adapter cannot be written to {folder} ({error}).") from error
    # first, because the server has room for one adapter unless told otherwise (`--max-loras`)
    for path in former:
        _unload(line, path.name)
        shutil.rmtree(path, ignore_errors=True)
    body = {"lora_name": name, "lora_path": str(folder / name)}
    try:
        line.ask(f"{line.base}/load_lora_adapter", body, lambda raw: None, seed=step, step="load")
    except Dropped as error:
        raise DataError(
            f"{line.base} did not load the adapter {name}: {error}. Look at the server's log; it must be started with "
            f"--max-lora-rank {config.r} or more."
        ) from None
    except Refused as refused:
        # loaded by an attempt whose answer was lost
        if "already been loaded" not in refused.said:
            raise _not_loaded(line, refused, config.r) from None
    return name


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The adapter under peft's names; in the main process, whole."""
    mark = f".{lora.ADAPTER}."
    trained = {
        f"base_model.model.{name.replace(mark, '.')}": parameter.detach()
        for name, parameter in model.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    return shard.gathered(trained, keep=runtime.process()[0] == 0)


def _write(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    save_file(dict(tensors), file, metadata={"format": "pt"})
    # safetensors writes for the owner alone, and the server may be another user's
    file.chmod(0o644)


def _unload(line: Connection, name: str) -> None:
    """What fails here leaves a name behind, and no weights for long: no reason to end a run."""
    try:
        line.ask(f"{line.base}/unload_lora_adapter", {"lora_name": name}, lambda raw: None, seed=0, step="unload")
    except Refused as refused:
        if refused.status != 404:  # a server that was started anew has never heard of it
            print(f"warning: {line.base} does not unload the adapter {name} ({refused}).", file=sys.stderr)
    except Dropped as error:
        print(f"warning: {line.base} did not unload the adapter {name} ({error}).", file=sys.stderr)


def _not_loaded(line: Connection, refused: Refused, rank: int) -> RecipeError:
    if refused.status in (401, 403):
        return line.no_access(refused)
    if refused.status == 404 and "No adapter found" in refused.said:
        return RecipeError(
            f"{line.base} does not find the adapter ({refused.said}). objective.rollouts.adapters must be a folder "
            "that this process and the server see under the same path."
        )
    if refused.status == 404:
        return RecipeError(
            f"{line.base} has no /load_lora_adapter ({refused.said}), so it cannot be given new weights. Start it "
            f"with run-time adapters: {START.format(rank=rank)}"
        )
    return RecipeError(f"{line.base} refuses the adapter ({refused}). Start it so: {START.format(rank=rank)}")


def _in_main_process(action: Callable[[], str]) -> str:
    """What `action` returns in the main process, or raises there, in every process; the others wait."""
    found: list[str | RewardTuneError | None] = [None]
    rank, world = runtime.process()
    if rank == 0:
        try:
            found = [action()]
        except RewardTuneError as error:
            found = [error]
    if world > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    (name,) = found
    if isinstance(name, RewardTuneError):
        raise name
    assert name is not None
    return name
