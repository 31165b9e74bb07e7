"""GDSO (Z-Reward, arXiv 2606.09076, section 4): a reasoning teacher learns from its own judgements.

Policy gradient on the expectation of the decoded distribution, cross-entropy on every sample's distribution, and the
score gap between all samples of two pictures; all three from one forward pass. GRPO: both direct losses off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardtune.data.records import PreferenceGroup, read_records
from rewardtune.errors import DataError
from rewardtune.randomness import epoch_index
from rewardtune.recipe.sections import GdsoSection, RewardGdsoRecipe
from rewardtune.scorer import losses, rollouts
from rewardtune.scorer.evaluate import held_out_figures
from rewardtune.scorer.export import export_scorer
from rewardtune.scorer.judgement_rewards import rewards, sampled_tokens, text_levels
from rewardtune.scorer.reasoning import Reasoner, load_reasoner
from rewardtune.scorer.remote_rollouts import RemoteSampler
from rewardtune.scorer.rollouts import RollOut
from rewardtune.scorer.targets import Pair, read_pairs
from rewardtune.scorer.trainable import trainable_scorer
from rewardtune.types import StepOutput


class RewardGdso:
    """See `tasks.Task`. batch_size: pairs of one optimiser step."""

    def __init__(
        self, reasoner: Reasoner, *, pairs: Sequence[Pair], objective: GdsoSection, batch_size: int, seed: int,
        base: str, held_out: Sequence[PreferenceGroup] = (), remote: RemoteSampler | None = None,
    ) -> None:  # fmt: skip
        if not pairs:
            raise DataError(
                "the records hold no two pictures of one prompt with different scores, and GDSO learns from pairs. "
                "Rate several pictures of each prompt, or train with task: reward_sft."
            )
        self.reasoner, self.pairs, self.objective, self.held_out = reasoner, pairs, objective, held_out
        self.batch_size, self.seed, self.base, self.remote = batch_size, seed, base, remote
        self.trainable: Mapping[str, nn.Module] = {"scorer": reasoner.scorer.model}
        self.reference = rollouts.Reference(self.trainable)
        self.drawn: dict[int, RollOut] = {}
        self.remembered: Mapping[str, Tensor] = {}

    def batch(self, step: int, indices: Sequence[int]) -> RollOut:
        """The pairs of these samples with traces; several updates in a row may share one roll-out."""
        o = self.objective
        if o.kl:
            self.reference.refresh(step // o.reference_every)
        number = step // o.updates_per_rollout
        first = number * self.batch_size + indices[0] - step * self.batch_size
        if first not in self.drawn:
            # of another step, or of an earlier roll-out
            self.drawn = {at: r for at, r in self.drawn.items() if at >= number * self.batch_size}
            self.drawn[first] = self._roll_out(step, range(first, first + len(indices)))
        return self.drawn[first] if o.updates_per_rollout > 1 else self.drawn.pop(first)

    def step(self, batch: RollOut) -> StepOutput:
        o, scorer = self.objective, self.reasoner.scorer
        read = batch.read(self.reasoner, tokens=o.policy > 0, temperature=o.temperature)
        logits = read.logits.unflatten(0, batch.drawn.shape)
        means = logits.softmax(-1) @ scorer.levels.to(logits.dtype)
        loss, metrics = logits.new_zeros(()), rollouts.figures(self.reasoner, batch, means.detach())
        if self.remote is not None:
            metrics |= {"rollout_dropped": batch.dropped, **rollouts.sampler_gap(batch, read)}
        if o.policy:
            fresh, parts = self._advantages(batch, logits.detach())
            advantages, metrics = fresh if batch.advantages is None else batch.advantages, {**metrics, **parts}
            log_probs, mask = sampled_tokens(batch, read, parsed=o.reward == "parsed")
            policy = losses.policy_loss(
                log_probs, mask, advantages.flatten(), old=batch.old, clip=o.clip, length=o.length
            )  # fmt: skip
            if batch.reference is not None:
                assert read.log_probs is not None and read.mask is not None
                kl = losses.reference_kl(read.log_probs, batch.reference, read.mask, length=o.length)
                policy, metrics["kl"] = policy + o.kl * kl, float(kl.detach())
            loss = loss + o.policy * policy
        rated, share = batch.rated, float(batch.rated.float().mean())
        if o.pointwise_loss and share:
            targets = torch.stack([p.targets for p in batch.pairs if p.targets is not None]).to(logits)
            pointwise = losses.distribution_cross_entropy(logits[rated], targets[:, :, None].expand_as(logits[rated]))
            loss, metrics["pointwise_loss"] = loss + o.pointwise_loss * share * pointwise, float(pointwise.detach())
        if o.pairwise_loss:
            ratings, values = batch.ratings.to(means), scorer.rubric.values
            gap, span = ratings[:, 0] - ratings[:, 1], values[-1] - values[0]
            gaps = losses.gap_loss(means[rated, 0], means[rated, 1], gap, span)
            orders = losses.order_loss(means[~rated, 0], means[~rated, 1])
            pairwise = torch.cat([gaps, orders]).mean()
            loss, metrics["pairwise_loss"] = loss + o.pairwise_loss * pairwise, float(pairwise.detach())
        return StepOutput(loss=loss, metrics=metrics)

    def samples(self) -> None:
        return None

    def evaluate(self) -> Mapping[str, float]:
        """Figures of `rewardtune evaluate --reasoning 1` on the held-out records, without intervals."""
        return held_out_figures(self.reasoner.scorer, self.held_out, reasoning=1)

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """A scorer's folder; its rubric says how it thinks."""
        probe = [(path, pair.prompt) for pair in self.pairs[:2] for path in pair.images]
        export_scorer(self.reasoner.scorer, folder, provenance, base=self.base, task="reward_gdso",
                      trained_on=f"{len(self.pairs):,} pairs", probe=probe)  # fmt: skip

    def memory(self) -> Mapping[str, Tensor]:
        """See `tasks.Remembers`: the reference, and the roll-outs that later updates still need."""
        weights = {f"shared.{name}": value for name, value in self.reference.weights.items()}
        return {**weights, **rollouts.memory(self.drawn)}

    def recall(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `memory` gave after `step` steps."""
        mark, device = "shared.", self.reasoner.scorer.device
        self.remembered = {name: value.to(device) for name, value in tensors.items() if not name.startswith(mark)}
        self.reference.weights = {k.removeprefix(mark): v.to(device) for k, v in tensors.items() if k.startswith(mark)}
        self.reference.iteration = (step - 1) // self.objective.reference_every

    def _roll_out(self, step: int, indices: Sequence[int]) -> RollOut:
        o = self.objective
        pairs = [self.pairs[epoch_index(self.seed, "gdso/order", i, len(self.pairs))] for i in indices]
        sample = self.reasoner.sample if self.remote is None else partial(self.remote.sample, step=step)
        out = rollouts.roll_out(
            self.reasoner, pairs, indices, sample=sample, samples=o.group_size, seed=self.seed,
            temperature=o.temperature, max_tokens=o.max_tokens, remembered=self.remembered,
        )  # fmt: skip
        if o.policy and o.updates_per_rollout > 1 and out.old is None:
            # rewards and ratios are those of the policy that drew the traces, whatever the updates do to it
            read = out.read(self.reasoner, tokens=True, temperature=o.temperature)
            logits = read.logits.unflatten(0, out.drawn.shape)
            out = replace(out, levels=text_levels(out, logits), advantages=self._advantages(out, logits)[0])
            out = replace(out, old=sampled_tokens(out, read, parsed=o.reward == "parsed")[0])
        if o.policy and o.kl and out.reference is None:
            with self.reference.applied():
                read = out.read(self.reasoner, tokens=True, temperature=o.temperature)
            out = replace(out, reference=read.log_probs)
        return out

    def _advantages(self, batch: RollOut, logits: Tensor) -> tuple[Tensor, dict[str, float]]:
        o = self.objective
        levels = self.reasoner.scorer.levels.to(logits.dtype)
        found, parts = rewards(
            batch, logits, levels, parsed=o.reward == "parsed", pointwise=o.pointwise_reward,
            pairwise=o.pairwise_reward,
        )  # fmt: skip
        return losses.group_advantages(found), parts


def build_reward_gdso(recipe: RewardGdsoRecipe, *, device: str) -> RewardGdso:
    """The task of a recipe; says on standard error which records make no pair."""
    o = recipe.objective
    scorer = trainable_scorer(recipe.scorer, train=recipe.train, device=device)
    pairs = read_pairs(recipe.data.records, scorer.rubric, target=o.target, preferences_in=o.preferences_in)
    held_out = read_records(recipe.data.held_out) if recipe.data.held_out else []
    reasoner, remote = load_reasoner(scorer), None
    if o.rollouts is not None:
        remote = RemoteSampler(reasoner, Path(o.rollouts.adapters), **o.rollouts.server.model_dump())
    return RewardGdso(
        reasoner, pairs=pairs, objective=o, batch_size=recipe.train.batch_size, seed=recipe.train.seed,
        base=recipe.scorer.model, held_out=held_out, remote=remote,
    )  # fmt: skip
