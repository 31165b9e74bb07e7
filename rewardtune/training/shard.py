"""FSDP2: the trained modules' parameters, gradients and optimiser state split over all processes (`train.shard`).

torch's `fully_shard` directly: accelerate's plug-in gives DDP on a CPU and says nothing. `state.py` shards, the loop
opens the modules around a step, and tensors become whole again for a checkpoint.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rewardtune.errors import RecipeError

if TYPE_CHECKING:
    from rewardtune.training.runtime import Runtime

_ENTRY = "_rewardtune_entry"


@dataclass(frozen=True)
class Shards:
    """The sharded modules of a run. Without any, which is the usual run, everything here does nothing."""

    roots: tuple[FSDPModule, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.roots)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, a task may call any part of a module and read any weight outside of its blocks.

        FSDP gathers parameters where a wrapped module's forward begins. Tasks also call submodules (hidden states,
        vision features) and read rows of the output embedding, so what no block owns is whole from here to the end;
        a block gathers itself. Leave before the parameters are changed.
        """
        with torch.no_grad():
            for root in self.roots:
                _enter(root)
        try:
            yield
        finally:
            for root in self.roots:
                root.reshard()

    def synchronise(self, on: bool) -> None:
        """Whether the next backward passes average gradients over processes, or only add them up here."""
        for root in self.roots:
            root.set_requires_gradient_sync(on)

    def finish_backward(self) -> None:
        """Average what is still waiting: sums of earlier micro-batches, weights used outside of their module's forward.

        Where nothing waits, nothing is sent. All processes must call it alike.
        """
        self.synchronise(True)
        for root in self.roots:
            _enter(root).backward()


def split(modules: Mapping[str, nn.Module], *, where: Runtime) -> Shards:
    """Shard every block of each module, then what is left of it, over all processes; in place.

    Trainable parameters must have one dtype, fp32 masters as a rule; frozen ones may have others. With precision bf16
    blocks are gathered in bf16 and their gradients averaged in fp32.
    Raises RecipeError where a module cannot be sharded, or where FSDP left parameters as they were.
    """
    if where.world == 1:
        print("train.shard: there is one process, so nothing is split (--nproc starts several).", file=sys.stderr)
        return Shards()
    mesh = init_device_mesh(where.device.type, (where.world,))
    # Under autocast fp32 blocks would be cast, and the casts kept for the backward pass: a whole model in bf16 on every
    # process. Inputs are left to autocast, because timesteps and positions must not be rounded.
    halves = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = halves if where.precision == "bf16" else MixedPrecisionPolicy()
    roots = []
    for name, module in modules.items():
        before = len(list(module.parameters()))
        try:
            for block in blocks(module):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            # What no block owns stays fp32 and whole within a step: embeddings, norms, the output layer. They make the
            # residual stream, and a tied pair of embeddings is in this one group.
            root: Any = fully_shard(module, mesh=mesh, reshard_after_forward=False)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise RecipeError(f"train.shard: {name} cannot be sharded: {error} Leave train.shard out.") from error
        _name_as_before(root)
        # Its backward may end before that of another use of the same weights; `open` ends it.
        root.set_reshard_after_backward(False, recurse=False)
        setattr(root, _ENTRY, lambda: torch.zeros((), device=where.device, requires_grad=torch.is_grad_enabled()) + 0)
        register_fsdp_forward_method(root, _ENTRY)
        _check(name, root, before=before, world=where.world)
        roots.append(root)
    return Shards(tuple(roots))


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, inner ones first.

    Those of the classes that it names in `_no_split_modules` (transformers' and diffusers' list of what must stay in
    one piece); where it names none, the children of its outermost lists.
    """
    names = getattr(module, "_no_split_modules", None) or ()
    named = [part for part in module.modules() if type(part).__name__ in names and part is not module]
    found = named or list(_listed(module))
    return [part for part in reversed(found) if any(True for _ in part.parameters())]


def held(like: Tensor, full: Tensor) -> Tensor:
    """Of a whole tensor, what this process holds where `like` is sharded; sends nothing."""
    if not isinstance(like, DTensor) or like.shape != full.shape:
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def alike(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor as `like` is at the moment, whole or split; all processes must call this."""
    full = whole(tensor)
    return held(like, full) if isinstance(like, DTensor) else full


def anywhere(here: Tensor, module: nn.Module) -> bool:
    """Whether a flag is set in any process, where the module is split; all processes must call this. Else, here."""
    flag = here.int()
    if isinstance(module, FSDPModule):
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def local(tensor: Tensor) -> Tensor:
    """The numbers that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, the same in all processes, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors, one after the other; sharded ones end on the CPU, and only where `keep` is set."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else tensor
    return found


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _listed(child)


def _check(name: str, root: nn.Module, *, before: int, world: int) -> None:
    """Raise RecipeError unless each parameter is one DTensor that is split over all processes."""
    parameters = dict(root.named_parameters())
    odd = [path for path, p in parameters.items() if not isinstance(p, DTensor) or p.device_mesh.size() != world]
    if odd:
        raise RecipeError(
            f"train.shard: {len(odd)} of {len(parameters)} parameters of {name} are not sharded, the first is "
            f"{odd[0]!r}. Leave train.shard out, and please report this with the output of `rewardtune env`."
        )
    if len(parameters) != before:
        raise RecipeError(
            f"train.shard: {name} uses the same weights in several of its blocks, which FSDP would train apart from "
            "each other. Leave train.shard out."
        )


def _name_as_before(root: FSDPModule) -> None:
    """Give FSDP's subclass the name of the class that it extends."""
    made, original = type(root), type(root).__mro__[2]
    # transformers looks up by this name which hidden states a model can give.
    made.__name__, made.__qualname__ = original.__name__, original.__qualname__
    made.__module__ = original.__module__
    # What FSDP warns of ends the gathering of a module that is passed by; `open` holds this one.
    warnings.filterwarnings("ignore", message=rf"FSDP2-wrapped module \({original.__name__}\) returned a view")


def _enter(root: FSDPModule) -> Tensor:
    """Through FSDP's own gate: makes `root` the root of its blocks, whoever is called first, and gathers its group.

    Going back from what is returned ends with FSDP's last callback, which averages every gradient that waits.
    """
    entry: Tensor = getattr(root, _ENTRY)()
    return entry
