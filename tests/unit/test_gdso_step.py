"""GDSO: what a step costs, when its reference is renewed, and rewards written out for orders and for parsed text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tiny_scorer import NAMES, pictures, write_reasoner
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rewardtune.build import build_task
from rewardtune.data.images import to_pil
from rewardtune.recipe.sections import Recipe
from rewardtune.scorer import losses, reasoning
from rewardtune.scorer.judgement_rewards import rewards
from rewardtune.scorer.rollouts import RollOut
from rewardtune.scorer.targets import Pair
from rewardtune.tasks.reward_gdso import RewardGdso
from rewardtune.training import runtime
from rewardtune.training.loop import train as loop
from rewardtune.training.track import read_metrics
from rewardtune.types import Prompt


def recipe(folder: Path, *, steps: int = 1, ordered: bool = False, **objective: Any) -> Any:
    """A recipe on three rated pictures of one prompt; ordered: two, of which only the order is known."""
    write_reasoner(folder, layers=["full_attention"] * 2)
    rows: list[dict[str, Any]] = []
    for i, picture in enumerate(to_pil(pictures(2 if ordered else 3))):
        picture.save(folder / f"{i}.png")
        rows.append({"group": "g", "prompt": "a dog", "image": f"{i}.png"})
        if not ordered:
            rows[-1]["scores"] = dict.fromkeys(NAMES, 1.5 + i)
    if ordered:
        rows = [{"group": "g", "prompt": "a dog", "chosen": "1.png", "rejected": "0.png"}]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TypeAdapter(Recipe).validate_python({
        "task": "reward_gdso", "scorer": {"model": str(folder)}, "data": {"records": str(folder / "records.jsonl")},
        "train": {"steps": steps, "batch_size": 2, "device": "cpu"},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
        "objective": {"group_size": 3, **objective},
    })  # fmt: skip


def build(folder: Path, **options: Any) -> RewardGdso:
    made: RewardGdso = build_task(recipe(folder, **options), device="cpu")  # type: ignore[assignment]
    return made


# ------------------------------------------------------------------------------------------------------- the reference


def test_the_reference_is_renewed_every_so_many_steps_of_a_run(tmp_path: Path):
    made = recipe(tmp_path, steps=6, kl=0.3, reference_every=2)
    (tmp_path / "run").mkdir()
    where = runtime.start(device="cpu", precision="fp32")
    loop(build_task(made, device="cpu"), folder=tmp_path / "run", train=made.train, optimizer=made.optimizer,
         where=where)  # fmt: skip
    kl = [line["kl"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    # right after a renewal policy and reference are one; a step later they are an update apart
    assert kl[0::2] == pytest.approx([0.0] * 3, abs=1e-9)
    assert min(kl[1::2]) > 1e-5


def test_the_kl_is_to_the_weights_of_the_last_renewal(tmp_path: Path):
    made = build(tmp_path, kl=0.3, reference_every=2)
    reasoner, model = made.reasoner, made.reasoner.scorer.model
    head = model.get_input_embeddings().weight  # type: ignore[operator]

    def said(batch: RollOut) -> torch.Tensor:
        found = batch.read(reasoner, tokens=True, temperature=1.0).log_probs
        assert found is not None
        return found

    kept: list[torch.Tensor] = []
    with torch.no_grad():
        for step in range(5):
            kept.append(head.clone())
            batch = made.batch(step, [2 * step, 2 * step + 1])
            assert torch.equal(head, kept[-1]), "the policy must come back behind the reference's reading"
            now, reference = said(batch), batch.reference
            head.copy_(kept[step // 2 * 2])
            then = said(batch)
            head.copy_(kept[-1])
            assert reference is not None
            torch.testing.assert_close(reference, then)
            assert torch.allclose(reference, now) == (step % 2 == 0)
            head += 0.02 * torch.randn(head.shape, generator=torch.Generator().manual_seed(step))


# ------------------------------------------------------------------------------------------------------------ the cost


class Products(TorchFunctionMode):
    """Notes the shapes of every matrix product with an output layer: (rows of input, rows of weight)."""

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths, self.seen = widths, list[tuple[int, int]]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and args[1].shape[0] in self.widths:
            self.seen.append((args[0].numel() // args[0].shape[-1], args[1].shape[0]))
        return function(*args, **(kwargs or {}))


def test_one_backbone_pass_and_one_row_of_levels_yield_all_three_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reasoning, "CHUNK", 8)
    made = build(tmp_path, kl=0.1)
    with torch.no_grad():
        batch = made.batch(0, [0, 1])
    model: Any = made.reasoner.scorer.model
    calls = {"backbone": 0, "vision": 0, "text": 0, "head": 0}
    parts = {"backbone": model.model, "vision": model.model.visual, "text": model.model.language_model,
             "head": model.lm_head}  # fmt: skip
    for name, part in parts.items():

        def count(module: Any, args: Any, name: str = name) -> None:
            calls[name] += 1

        part.register_forward_pre_hook(count)
    vocabulary, levels = len(model.get_input_embeddings().weight), len(made.reasoner.scorer.levels)
    held: list[torch.Size] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.shape)
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor)
    with Products({vocabulary, levels}) as products, keeping:
        output = made.step(batch)
    output.loss.backward()
    assert {"pointwise_loss", "pairwise_loss", "kl", "reward"} <= output.metrics.keys()
    # the whole output layer is never called; the vision tower is, inside of `get_image_features`
    assert calls == {"backbone": 1, "vision": 1, "text": 1, "head": 0}
    judgements = 2 * 2 * 3
    assert [rows for rows, width in products.seen if width == levels] == [judgements]
    tokens = sum(len(trace.ids) + trace.ended for trace in batch.traces)
    chunks = [rows for rows, width in products.seen if width == vocabulary]
    assert sum(chunks) == tokens > 3 * 8 and max(chunks) == 8
    # the logits of the traces are not kept for the backward pass
    assert held and all(shape[-1:] != (vocabulary,) for shape in held)


# ------------------------------------------------------------------------------------------------------------ rewards

LEVELS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair(ratings: tuple[float, float] | None = None) -> Pair:
    return Pair(Prompt("a dog"), (Path("a.png"), Path("b.png")), 0, ratings)


def rolled(*pairs: Pair, drawn: torch.Tensor) -> RollOut:
    return RollOut([*pairs], [], [], [], drawn)


def certain(means: list[list[list[float]]]) -> torch.Tensor:
    """Logits (P, 2, G, 5) whose distribution is one level."""
    where = (torch.tensor(means)[..., None] == LEVELS).float()
    return 100.0 * where


def test_the_reward_for_an_order_is_the_mean_chance_that_it_is_right():
    first, second = losses.order_rewards(torch.tensor([4.0, 1.0]), torch.tensor([3.0, 3.0]))
    # 4 against 3 twice, 1 against 3 twice
    assert first.tolist() == pytest.approx([sigma(1), sigma(-2)])
    assert second.tolist() == pytest.approx([(sigma(1) + sigma(-2)) / 2] * 2)
    first, second = losses.order_rewards(torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0, 4.0]]))
    assert first.tolist() == [pytest.approx([(sigma(1) + sigma(-2)) / 2, (sigma(4) + sigma(1)) / 2])]
    # the preferred side earns by rising, the other by falling
    assert second.tolist() == [pytest.approx([(sigma(1) + sigma(4)) / 2, (sigma(-2) + sigma(1)) / 2])]


def test_a_batch_may_hold_scores_and_orders():
    batch = rolled(pair((4.0, 2.0)), pair(), drawn=torch.zeros(2, 2, 2))
    logits = certain([[[4, 3], [2, 5]], [[4, 1], [3, 3]]])
    found, parts = rewards(batch, logits, LEVELS, parsed=False, pointwise=2.0, pairwise=3.0)
    near = [[1, 3 / 4], [1, 1 / 4]]
    # gap errors against a gap of 2: 4-2 has none, 4-5 is 3 off, 3-2 is 1 off, 3-5 is 4 off
    apart = [[1 - (0 + 3) / 8, 1 - (1 + 4) / 8], [1 - (0 + 1) / 8, 1 - (3 + 4) / 8]]
    rated = [[2 * n + 3 * a for n, a in zip(*row, strict=True)] for row in zip(near, apart, strict=True)]
    order = [[3 * sigma(1), 3 * sigma(-2)], [3 * (sigma(1) + sigma(-2)) / 2] * 2]
    torch.testing.assert_close(found, torch.tensor([rated, order]))
    assert parts["reward/pointwise"] == pytest.approx(3 / 4) and parts["reward/pairwise"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("ratings", [(4.0, 2.0), None])
def test_parsed_rewards_compare_the_levels_that_the_texts_say(ratings: tuple[float, float] | None):
    # half of the mass on each of two levels: the expectations are 3, 3 and 2, 4; the texts say 2, 4 and 1, 5
    likely = [[[(2, 4), (2, 4)], [(1, 3), (3, 5)]]]
    logits = torch.full((1, 2, 2, 5), -100.0)
    for side in (0, 1):
        for sample in (0, 1):
            for level in likely[0][side][sample]:
                logits[0, side, sample, level - 1] = 0.0
    drawn = torch.tensor([[[0.25, 0.75], [0.25, 0.75]]])
    batch = rolled(pair(ratings), drawn=drawn)
    found, parts = rewards(batch, logits, LEVELS, parsed=True, pointwise=0.0, pairwise=1.0)
    expected, _ = rewards(batch, logits, LEVELS, parsed=False, pointwise=0.0, pairwise=1.0)
    if ratings is None:
        # 2 against 1 and 5, 4 against 1 and 5
        said = [[(sigma(1) + sigma(-3)) / 2, (sigma(3) + sigma(-1)) / 2],
                [(sigma(1) + sigma(3)) / 2, (sigma(-3) + sigma(-1)) / 2]]  # fmt: skip
        meant = [[(sigma(1) + sigma(-1)) / 2] * 2, [sigma(1), sigma(-1)]]
    else:
        # gap errors against 2: 2-1 is 1 off, 2-5 is 5 off, 4-1 is 1 off, 4-5 is 3 off
        said = [[1 - 6 / 8, 1 - 4 / 8], [1 - 2 / 8, 1 - 8 / 8]]
        # 3-2 is 1 off, 3-4 is 3 off
        meant = [[1 - 4 / 8] * 2, [1 - 1 / 4, 1 - 3 / 4]]
        assert parts["reward/pairwise"] == pytest.approx(3 / 8)
    torch.testing.assert_close(found, torch.tensor([said]))
    torch.testing.assert_close(expected, torch.tensor([meant]))


@pytest.mark.parametrize("reward", ["expectation", "parsed"])
def test_the_policy_learns_from_preferences_alone(tmp_path: Path, reward: str):
    made = build(tmp_path, ordered=True, preferences_in="realism", kl=0.0, policy=0.7, pairwise_reward=2.0,
                 pointwise_loss=0.0, pairwise_loss=0.0, reward=reward)  # fmt: skip
    with torch.no_grad():
        batch = made.batch(0, [0])
    reasoner = made.reasoner
    read = reasoner.read(batch.images, batch.questions, batch.traces, tokens=True)
    assert read.log_probs is not None and read.mask is not None
    q = read.logits.detach().softmax(-1)
    mu = (q @ reasoner.scorer.levels).tolist()
    # the level that each text says, by counting up its distribution
    level = [
        next(k for k in range(9) if float(q[n, : k + 1].sum()) > float(u)) for n, u in enumerate(batch.drawn.flatten())
    ]
    if reward == "parsed":
        mu = [float(reasoner.scorer.levels[k]) for k in level]
    total: Any = 0.0
    for side in (0, 1):
        mine, others = mu[side * 3 : side * 3 + 3], mu[3 - side * 3 : 6 - side * 3]
        earned = [2.0 * sum(sigma(m - o if side == 0 else o - m) for o in others) / 3 for m in mine]
        mean = sum(earned) / 3
        deviation = math.sqrt(sum((r - mean) ** 2 for r in earned) / 2)
        for i in range(3):
            n = side * 3 + i
            advantage = (earned[i] - mean) / (deviation + 1e-4)
            likelihood = read.log_probs[n][read.mask[n]].sum()
            if reward == "parsed":
                likelihood = likelihood + read.logits[n].log_softmax(-1)[level[n]]
            total = total - 0.7 * advantage * likelihood / 6
    output = made.step(batch)
    assert len(set(mu)) > 1 and output.metrics["reward"] == pytest.approx(
        2.0 * sum(sigma(a - b) for a in mu[:3] for b in mu[3:]) / 9
    )
    weight = reasoner.scorer.model.get_input_embeddings().weight  # type: ignore[operator]
    wanted, found = (torch.autograd.grad(x, weight)[0] for x in (total, output.loss))
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)
