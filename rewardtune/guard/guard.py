"""The looks of a run in its folder, the weights of the best one, and what the loop asks: go on, or end?

`guard/looks.jsonl` has a line a look; `guard/start.npy` the features of the start's images;
`guard/best-<step>.safetensors` the trained weights as they would be exported.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rewardtune.errors import DiskError
from rewardtune.guard.verdict import Rule, Seen, Verdict, verdict

if TYPE_CHECKING:
    from rewardtune.guard.watch import Look
    from rewardtune.plugins import RewardCard

FOLDER = "guard"
LOOKS = "looks.jsonl"
_START = "start.npy"
Action = Literal["warn", "stop", "roll_back"]


class Guard:
    """watch: draws and scores. every: optimiser steps between looks. action: what happens when it is enough.

    `warn` prints it and trains on, `stop` ends the training, `roll_back` ends it and takes the weights of the best step
    (also at the ordinary end). cards: of the held-out rewards, as loaded.
    """

    def __init__(
        self, watch: Callable[[], Look], rule: Rule, *, every: int, action: Action, folder: Path,
        cards: Sequence[RewardCard] = (),
    ) -> None:  # fmt: skip
        self.watch, self.rule, self.every, self.action, self.cards = watch, rule, every, action, cards
        self.folder = folder / FOLDER
        self.looks: list[Seen] = []
        self.verdict: Verdict | None = None
        self._said: tuple[str, ...] = ()

    def resume(self, step: int) -> None:
        """Take back the looks up to `step`; later ones are of a future that did not happen."""
        self.recall([look for look in read_looks(self.folder) if look.step <= step])

    def recall(self, looks: Sequence[Seen]) -> None:
        """Know these looks, as another process or an earlier one had them."""
        self.looks = list(looks)
        self.verdict = verdict(self.looks, self.rule) if self.looks else None
        self._said = self.verdict.reasons if self.verdict else ()

    def due(self, step: int, last: int) -> bool:
        """At the start, every so many steps, and at the end."""
        done = self.looks and self.looks[-1].step == step
        return not done and (step % self.every == 0 or step == last)

    @property
    def ends(self) -> bool:
        """Whether the training should end here."""
        return self.action != "warn" and self.verdict is not None and bool(self.verdict.reasons)

    def add(self, step: int, look: Look, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Keep a look, and the weights where it is the best so far; returns what to log. Raises DiskError."""
        try:
            self.folder.mkdir(exist_ok=True)
            if not self.looks:
                np.save(self.folder / _START, look.features)
            start = np.load(self.folder / _START)
        except OSError as error:
            raise DiskError(f"{self.folder} cannot be written or read ({error}).") from error
        first = self.looks[0].diversity if self.looks else look.diversity
        drift = float(np.linalg.norm(look.features - start, axis=1).mean()) / (first or 1.0)
        values = {name: [round(float(v), 6) for v in found] for name, found in look.held_out.items()}
        self.looks.append(Seen(step, values, look.diversity, drift, look.trained))
        self.verdict = verdict(self.looks, self.rule)
        try:
            text = "".join(json.dumps(dataclasses.asdict(seen)) + "\n" for seen in self.looks)
            (self.folder / f".{LOOKS}").write_text(text)
            (self.folder / f".{LOOKS}").rename(self.folder / LOOKS)
            if self.action == "roll_back" and self.verdict.best == step:
                _save(self._file(step), weights)
        except OSError as error:
            raise DiskError(f"{self.folder} cannot be written ({error}). Free some disk space.") from error
        if self.verdict.reasons and self.verdict.reasons != self._said:
            print(f"guard: at step {step} {'; '.join(self.verdict.reasons)}. {self._consequence()}", file=sys.stderr)
        self._said = self.verdict.reasons
        shown = {f"guard/{name}": float(np.mean(found)) for name, found in values.items()}
        shown |= {"guard/score": self.verdict.scores[-1], "guard/diversity": look.diversity, "guard/drift": drift}
        if look.trained is not None:
            shown["guard/trained"] = look.trained
        return shown | {"guard/best_step": float(self.verdict.best)}

    def saved(self) -> None:
        """A checkpoint holds this step: weights of former bests will not be asked for again."""
        if self.verdict is not None:
            for file in self.folder.glob("best-*.safetensors"):
                if file != self._file(self.verdict.best):
                    file.unlink(missing_ok=True)

    def chosen(self) -> int | None:
        """The step whose weights are exported where that is not the last one."""
        if self.action != "roll_back" or self.verdict is None or self.verdict.best == self.looks[-1].step:
            return None
        return self.verdict.best

    @torch.no_grad()
    def take_back(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the weights of the chosen step."""
        from safetensors.torch import load_file

        from rewardtune.training.shard import held

        step = self.chosen()
        assert step is not None
        try:
            tensors = load_file(self._file(step))
        except OSError as error:
            raise DiskError(f"the weights of step {step}, which the guard chose, cannot be read ({error}).") from error
        for name, parameter in parameters.items():
            parameter.copy_(held(parameter, tensors[name]))

    def outcome(self) -> dict[str, object]:
        """For finished.json."""
        assert self.verdict is not None
        return {
            "action": self.action,
            "acted": bool(self.verdict.reasons),
            "exported_step": self.looks[-1].step if self.chosen() is None else self.chosen(),
            "best_step": self.verdict.best,
            "last_step": self.looks[-1].step,
            "reasons": list(self.verdict.reasons),
        }

    def _consequence(self) -> str:
        if self.action == "warn":
            return "Training goes on (guard.action warn)."
        if self.action == "stop":
            return "Training ends here (guard.action stop)."
        assert self.verdict is not None
        return f"Training ends here, and step {self.verdict.best} is taken (guard.action roll_back)."

    def _file(self, step: int) -> Path:
        return self.folder / f"best-{step:06d}.safetensors"


def read_looks(folder: Path) -> list[Seen]:
    """The looks that a run folder's `guard/` holds; none where there is none."""
    try:
        lines = (folder / LOOKS).read_text().splitlines()
    except OSError:
        return []
    return [Seen(**json.loads(line)) for line in lines]


def _save(file: Path, weights: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = file.with_name(f".{file.name}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)
    temporary.rename(file)
