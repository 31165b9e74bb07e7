"""A call of a pipeline that runs as a whole, watched from outside: which steps it takes, and which record gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class WatchedCall:
    """Follows one call: tells its steps apart, lets the chosen ones record gradient, and notices where it is lost."""

    def __init__(
        self,
        pipe: Any,
        gradient_steps: Callable[[int], range],
        *,
        recompute: bool,
        refusal: Callable[[str], Exception],
    ) -> None:
        """pipe: with the scheduler that this call has for itself.

        gradient_steps: from the number of steps to those that record. recompute: keep no graph within a step or the
        decoder, but run them again on the way back. refusal: what is raised, from what the pipeline does wrong.
        """
        self._pipe, self._gradient_steps, self._recompute, self._refusal = pipe, gradient_steps, recompute, refusal
        self._taken = 0

    @contextmanager
    def watched(self, denoiser: nn.Module) -> Iterator[None]:
        """Inside, `scheduler.step` counts, and denoiser and decoder record as the step wants it."""
        scheduler, vae = self._pipe.scheduler, getattr(self._pipe, "vae", None)
        with ExitStack() as stack:
            stack.enter_context(replaced(scheduler, "step", self._counted(scheduler.step)))
            stack.enter_context(replaced(denoiser, "forward", self._recorded(denoiser)))
            if vae is not None:
                # recomputing the decoder keeps its graph away while the reward's lives, and the other way round
                stack.enter_context(replaced(vae, "decode", self._recomputed(vae.decode)))
            yield

    def check(self, images: Tensor) -> None:
        """Raise RecipeError where the call took other steps than it was to take, or its image has no graph."""
        if self._taken != self._total:
            raise self._refusal(
                f"takes {self._taken} steps where its scheduler has {self._total}, so it cannot be told which are the "
                "last"
            )
        if self._chosen and not images.requires_grad:
            raise self._refusal(
                "leaves the graph between its last step and the image (it decodes without gradient, or detaches), so "
                "there is nothing to train on"
            )

    @property
    def _total(self) -> int:
        """The steps of this call: as it notes them before the first, for it may leave some of the scheduler's out."""
        noted: int | None = getattr(self._pipe, "_num_timesteps", None)
        return len(self._pipe.scheduler.timesteps) if noted is None else noted

    @cached_property
    def _chosen(self) -> range:
        return self._gradient_steps(self._total)

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)  # pipelines ask for its signature
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._taken += 1
            return step(*args, **kwargs)

        return counted

    def _recorded(self, denoiser: Any) -> Callable[..., Any]:
        import torch

        forward: Callable[..., Any] = denoiser.forward

        @wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            chosen = self._chosen
            if self._taken not in chosen:
                with torch.no_grad():
                    return forward(*args, **kwargs)
            if self._taken > chosen.start and not any(t.requires_grad for t in _tensors((args, kwargs))):
                raise self._refusal(
                    "leaves the graph between its steps (it detaches its latents, or its scheduler does), so only the "
                    "last one would be trained"
                )
            if not self._recompute:
                return forward(*args, **kwargs)
            return self._recomputed(_with_its_processors(denoiser, forward))(*args, **kwargs)

        return recorded

    def _recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        from torch.utils.checkpoint import checkpoint

        @wraps(function)
        def recomputed(*args: Any, **kwargs: Any) -> Any:
            # torch looks after positional tensors only
            versions = [t._version for t in _tensors((args, kwargs))]

            def run(*args: Any, **kwargs: Any) -> Any:
                if [t._version for t in _tensors((args, kwargs))] != versions:
                    raise self._refusal(
                        "changes tensors in place, so its steps cannot be run again; write gradient.memory: fast"
                    )
                return function(*args, **kwargs)

            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return recomputed


def _with_its_processors(denoiser: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the attention processors of now, whenever it is run.

    Some calls put others in and take them out at their end (perturbed-attention guidance): a step that is run again on
    the way back would be another function.
    """
    processors = getattr(denoiser, "attn_processors", None)
    if processors is None:
        return forward

    @wraps(forward)
    def same(*args: Any, **kwargs: Any) -> Any:
        before = denoiser.attn_processors
        if all(before.get(name) is processor for name, processor in processors.items()):
            return forward(*args, **kwargs)
        denoiser.set_attn_processor(dict(processors))  # takes out of the dict what it has put in
        try:
            return forward(*args, **kwargs)
        finally:
            denoiser.set_attn_processor(dict(before))

    return same


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among a call's arguments, and in their lists and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's own generators start from `seed`; afterwards they go on as if nothing had been drawn.

    Some calls draw from them, beside the generators that they are given: for a scheduler's noise, to rewrite a prompt.
    """
    import torch

    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `thing` has another attribute; methods are put over the class's own."""
    before = vars(thing).get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(thing, name)
        else:
            setattr(thing, name, before)
