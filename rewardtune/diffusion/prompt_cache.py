"""Embeddings of prompts in main memory, so that frozen text encoders run once a prompt.

A prompt is encoded by itself and a batch is put together from such (`Pipeline.join`), whether they were kept or not. So
the numbers that a sample is trained with depend neither on its neighbours nor on what has been kept or forgotten: a run
without room for embeddings, a resumed one, and one on more processes have the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewardtune.diffusion.conditioning import mapped
from rewardtune.plugins import Guidance, Pipeline
from rewardtune.progress import Progress


class PromptCache:
    """limit: bytes that are kept; what was not used for longest goes first. end: samples of the run, whose prompts are
    encoded ahead as far as there is room, for text encoders that have to come to the device; 0: as they are met."""

    def __init__(self, pipeline: Pipeline, guidance: Guidance, *, limit: int, end: int = 0) -> None:
        self.pipeline, self.guidance, self.limit, self.end = pipeline, guidance, limit, end
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._size = 0
        self._first: Any = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, first: int, prompt_of: Callable[[int], str]) -> Any:
        """Conditioning of a batch. first: its first sample. prompt_of: the prompt of a sample, this one or a later."""
        texts = [str(prompt) for prompt in prompts]
        if self.limit and any(text not in self._kept for text in texts):
            self._ahead(list(dict.fromkeys(str(prompt_of(i)) for i in range(first, self.end))))
        found = {text: self._one(text) for text in dict.fromkeys(texts)}
        return self.pipeline.join([found[text] for text in texts])

    def _ahead(self, texts: Sequence[str]) -> None:
        progress, room = Progress("prompts encoded ahead", len(texts)), self.limit
        for text in texts:
            if text in self._kept:
                self._kept.move_to_end(text)
            else:
                self._fresh(text)
            room -= self._kept[text][1] if text in self._kept else self.limit
            if room <= 0:  # the first of them would be forgotten again
                return
            progress.advance(1)

    def _one(self, text: str) -> Any:
        if text not in self._kept:
            return self._fresh(text)
        self._kept.move_to_end(text)
        device = next(self.pipeline.trainable[self.pipeline.denoiser].parameters()).device
        return mapped(lambda tensor, _: tensor.to(device), self._kept[text][0])

    def _fresh(self, text: str) -> Any:
        fresh = self.pipeline.encode([text], self.guidance)
        if not self.limit:
            return fresh
        size = 0

        def home(tensor: Tensor, like: Any) -> Tensor:
            nonlocal size
            copy = tensor.cpu().clone()  # it may be a view of something larger
            if isinstance(like, Tensor) and like.dtype == copy.dtype and torch.equal(like, copy):
                return like  # what comes with every prompt, as the negative one does, is kept once
            size += copy.nbytes
            return copy

        kept = mapped(home, fresh, self._first)
        self._first = kept if self._first is None else self._first
        self._kept[text] = (kept, size)
        self._size += size
        while self._size > self.limit:
            self._size -= self._kept.popitem(last=False)[1][1]
        return fresh
