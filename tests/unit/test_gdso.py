"""GDSO: every term against a second formulation, the step against the sums written out, and bad records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_scorer import NAMES, pictures, write_reasoner

from rewardtune.data.images import read_tensors, to_pil
from rewardtune.data.records import PreferenceGroup, RatedImage, write_records
from rewardtune.errors import DataError
from rewardtune.recipe.sections import GdsoSection
from rewardtune.scorer import losses
from rewardtune.scorer.evaluate import evaluate_groups, held_out_figures
from rewardtune.scorer.model import load_scorer
from rewardtune.scorer.reasoning import Reasoner, Trace, load_reasoner
from rewardtune.scorer.targets import Pair, check_labels, make_pairs, read_pairs, target_maker
from rewardtune.tasks.reward_gdso import RewardGdso
from rewardtune.tasks.reward_sft import rated_rows
from rewardtune.types import Prompt

# ------------------------------------------------------------------------------------------------------------ formulas

MEANS = torch.tensor([[1.2, 3.1, 4.4], [2.0, 2.5, 1.1]], dtype=torch.float64)
"""mu of three samples a side."""
RATINGS = (4.0, 2.5)
SPAN = 4.0


def test_pointwise_reward_is_equation_7():
    found = losses.pointwise_reward(MEANS, torch.tensor(RATINGS, dtype=torch.float64), SPAN)
    for j in (0, 1):
        for i in range(3):
            assert float(found[j, i]) == pytest.approx(1 - abs(float(MEANS[j, i]) - RATINGS[j]) / SPAN)


def test_pairwise_rewards_and_gap_loss_are_equations_10_and_11_as_double_sums():
    gap = torch.tensor(RATINGS[0] - RATINGS[1], dtype=torch.float64)
    first, second = losses.pairwise_rewards(MEANS[0], MEANS[1], gap, SPAN)
    total = 0.0
    for j, found in ((0, first), (1, second)):
        wanted_gap = RATINGS[j] - RATINGS[1 - j]
        for i in range(3):
            errors = [abs(float(MEANS[j, i] - MEANS[1 - j, k]) - wanted_gap) for k in range(3)]
            assert float(found[i]) == pytest.approx(1 - sum(errors) / (3 * SPAN))
            total += sum(errors)
    assert float(losses.gap_loss(MEANS[0], MEANS[1], gap, SPAN)) == pytest.approx(total / (2 * 9 * SPAN))


def test_the_gap_loss_moves_both_sides_and_agrees_with_finite_differences():
    means = MEANS.clone().requires_grad_(True)
    gap = torch.tensor(1.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: losses.gap_loss(m[0], m[1], gap, SPAN), (means,))
    (gradient,) = torch.autograd.grad(losses.gap_loss(means[0], means[1], gap, SPAN), means)
    assert (gradient.abs().sum(1) > 0).all()


def test_advantages_are_equation_3_within_each_group():
    rewards = torch.tensor([[0.2, 0.8, 0.5], [0.1, 0.1, 0.1]], dtype=torch.float64)
    found = losses.group_advantages(rewards)
    mean, deviation = 0.5, math.sqrt((0.3**2 + 0.3**2) / 2)
    assert found[0].tolist() == pytest.approx([(r - mean) / (deviation + 1e-4) for r in (0.2, 0.8, 0.5)])
    assert found[1].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


def test_an_unscorable_sample_counts_for_nobody():
    rewards = torch.tensor([[0.2, 0.8, math.nan]], dtype=torch.float64)
    found = losses.group_advantages(rewards, torch.tensor([[True, True, False]]))
    alone = losses.group_advantages(rewards[:, :2])
    assert found[0, :2].tolist() == pytest.approx(alone[0].tolist()) and float(found[0, 2]) == 0.0


def test_policy_gradient_of_equation_4_is_minus_the_advantage_at_every_token():
    log_probs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    advantages = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64)
    (summed,) = torch.autograd.grad(losses.policy_loss(log_probs, mask, advantages), log_probs)
    torch.testing.assert_close(summed, -advantages[:, None] * mask / 3)
    (averaged,) = torch.autograd.grad(losses.policy_loss(log_probs, mask, advantages, length="mean"), log_probs)
    torch.testing.assert_close(averaged, -advantages[:, None] * mask / mask.sum(1, keepdim=True) / 3)


def test_clipping_stops_the_gradient_where_the_ratio_has_left_the_bound():
    old = torch.zeros(2, 2, dtype=torch.float64)
    new = torch.tensor([[0.5, 0.05], [0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    mask, advantages = torch.ones(2, 2, dtype=torch.bool), torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = losses.policy_loss(new, mask, advantages, old=old, clip=0.2)
    ratio = [[math.exp(0.5), math.exp(0.05)], [math.exp(0.5), math.exp(-0.5)]]
    gain = [min(ratio[0][0], 1.2) + min(ratio[0][1], 1.2), -max(ratio[1][0], 0.8) - max(ratio[1][1], 0.8)]
    assert float(loss.detach()) == pytest.approx(-sum(gain) / 2)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient[0, 0] == 0 and gradient[1, 1] == 0 and gradient[0, 1] < 0 and gradient[1, 0] > 0


def test_the_kl_estimate_is_unbiased_for_the_true_kl():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    draws = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=g)
    mask = torch.ones(len(draws), 1, dtype=torch.bool)
    found = losses.reference_kl(policy[draws][:, None], reference[draws][:, None], mask)
    true = float((policy.exp() * (policy - reference)).sum())
    assert float(found) == pytest.approx(true, rel=0.02)
    assert float(losses.reference_kl(policy[None], policy[None], torch.ones(1, 6, dtype=torch.bool))) == 0.0


def test_forward_kl_over_traces_differs_from_that_to_their_mean_by_a_constant():
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64).softmax(-1)
    logits = torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    each = [
        sum(float(q) * (math.log(float(q)) - float(p)) for q, p in zip(teacher[b, d, r], log_p, strict=True))
        for b in range(2) for d in range(3) for r in range(4)
        for log_p in [logits[b, d].detach().log_softmax(-1)]
    ]  # fmt: skip
    loss = losses.forward_kl(logits, teacher)
    assert float(loss.detach()) == pytest.approx(sum(each) / len(each))
    mean = losses.forward_kl(logits, teacher.mean(2, keepdim=True))
    a, b = (torch.autograd.grad(x, logits)[0] for x in (loss, mean))
    torch.testing.assert_close(a, b)
    assert float(loss.detach()) > float(mean.detach())


def test_what_the_teacher_could_not_say_is_left_out():
    teacher = torch.tensor([[[[0.2, 0.8]], [[math.nan, math.nan]]]], dtype=torch.float64)
    logits = torch.zeros(1, 2, 2, dtype=torch.float64)
    wanted = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert float(losses.forward_kl(logits, teacher)) == pytest.approx(wanted)


# ---------------------------------------------------------------------------------------------------------------- task


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return load_reasoner(load_scorer(write_reasoner(tmp_path_factory.mktemp("r"), layers=["full_attention"] * 2)))


def groups(folder: Path, scores: Sequence[Sequence[float]]) -> list[PreferenceGroup]:
    """Groups of pictures with the same score in every dimension."""
    found = []
    for g, values in enumerate(scores):
        images = []
        for i, (value, picture) in enumerate(zip(values, to_pil(pictures(len(values), seed=g)), strict=True)):
            picture.save(folder / f"{g}-{i}.png")
            images.append(RatedImage(folder / f"{g}-{i}.png", dict.fromkeys(NAMES, value)))
        found.append(PreferenceGroup(f"g{g}", Prompt(f"a dog {g}"), tuple(images)))
    return found


def task(reasoner: Reasoner, folder: Path, **objective: object) -> RewardGdso:
    pairs, _ = make_pairs(groups(folder, [[1.0, 4.5, 3.0], [2.0, 5.0]]), reasoner.scorer.rubric, target="hard",
                          preferences_in=None)  # fmt: skip
    section = GdsoSection.model_validate({"group_size": 3, **objective})
    reasoner.scorer.model.requires_grad_(True)
    return RewardGdso(reasoner, pairs=pairs, objective=section, batch_size=2, seed=0, base="tiny")


def test_the_step_is_equation_14_written_out(reasoner: Reasoner, tmp_path: Path):
    o = {"pointwise_reward": 0.7, "pairwise_reward": 1.3, "pointwise_loss": 0.4, "pairwise_loss": 0.6, "kl": 0.2,
         "policy": 0.9}  # fmt: skip
    made = task(reasoner, tmp_path, **o)
    with torch.no_grad():
        batch = made.batch(0, [0, 1])
        # a reference that differs, as it does later in training
        batch = type(batch)(**{**vars(batch), "reference": batch.reference + 0.1 * batch.reference.sign()})
    read = reasoner.read(batch.images, batch.questions, batch.traces, tokens=True)
    levels = reasoner.scorer.levels
    q = read.logits.softmax(-1).view(2, 2, 3, -1)
    mu = q @ levels
    total = 0.0
    for p, pair in enumerate(batch.pairs):
        for j in (0, 1):
            rewards = []
            for i in range(3):
                point = 1 - abs(float(mu[p, j, i].detach()) - pair.ratings[j]) / 4
                gap = pair.ratings[j] - pair.ratings[1 - j]
                off = [abs(float((mu[p, j, i] - mu[p, 1 - j, k]).detach()) - gap) for k in range(3)]
                rewards.append(o["pointwise_reward"] * point + o["pairwise_reward"] * (1 - sum(off) / 12))
            mean = sum(rewards) / 3
            deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 2)
            for i in range(3):
                n = p * 6 + j * 3 + i
                advantage = (rewards[i] - mean) / (deviation + 1e-4)
                tokens, old = read.log_probs[n][read.mask[n]], batch.reference[n][read.mask[n]]
                # the ratio's gradient is the log-probability's; its value is one a token
                policy = advantage * (tokens - tokens.detach() + 1).sum()
                kl = ((old - tokens).exp() - (old - tokens) - 1).sum()
                total = total - o["policy"] * (policy - o["kl"] * kl) / 12
                level = int((levels - pair.ratings[j]).abs().argmin())
                total = total - o["pointwise_loss"] * q[p, j, i, level].log() / 12
                for k in range(3):
                    gap_error = ((mu[p, j, i] - mu[p, 1 - j, k]) - (pair.ratings[j] - pair.ratings[1 - j])).abs()
                    total = total + o["pairwise_loss"] * gap_error / (2 * 9 * 4) / 2
    output = made.step(batch)
    torch.testing.assert_close(output.loss, total, atol=1e-5, rtol=1e-4)
    weight = reasoner.scorer.model.get_input_embeddings().weight
    wanted, found = (torch.autograd.grad(x, weight)[0] for x in (total, output.loss))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert output.metrics["kl"] > 0 and 0 < output.metrics["trace_tokens"] <= 6


def test_empty_and_endless_traces_are_learned_from_and_counted(reasoner: Reasoner, tmp_path: Path):
    made = task(reasoner, tmp_path, kl=0.0)
    batch = made.batch(0, [0, 1])
    # of twelve traces one is nothing, one is a line break, and three were cut off
    line_break = tuple(reasoner.scorer.tokenizer.encode("\n", add_special_tokens=False))
    given = [Trace((), True), Trace(line_break, True), *[Trace((9, 10), i > 2) for i in range(10)]]
    metrics = made.step(replace(batch, traces=given)).metrics
    assert metrics["trace_empty"] == pytest.approx(2 / 12) and metrics["trace_ended"] == pytest.approx(9 / 12)
    assert metrics["trace_tokens"] == pytest.approx(21 / 12)
    # each has a distribution: a step on traces that are all empty is one on the prompts alone
    empty = replace(batch, traces=[Trace((), True)] * 12)
    output = made.step(empty)
    assert output.loss.isfinite() and output.metrics["trace_empty"] == 1.0


def test_evaluate_counts_empty_and_endless_traces(reasoner: Reasoner, tmp_path: Path):
    records = groups(tmp_path, [[1.0, 4.5, 3.0], [2.0, 5.0]])
    document = evaluate_groups(reasoner.scorer, records, resamples=0, reasoning=3, batch_size=2)
    written = []
    for start in (0, 2, 4):
        some = [(image.image, group.prompt) for group in records for image in group.images][start : start + 2]
        written += reasoner.every_dimension(
            read_tensors(path for path, _ in some), [prompt for _, prompt in some], traces=3, stream=(0, "evaluate"),
            places=range(start, start + len(some)),
        )[0]  # fmt: skip
    assert len(written) == 5 * 4 * 3
    ended, empty = sum(t.ended for t in written) / 60, sum(not reasoner.text(t) for t in written) / 60
    assert 0 < ended < 1
    assert document["trace_ended"] == pytest.approx(ended, abs=1e-4)
    assert document["trace_empty"] == pytest.approx(empty, abs=1e-4)
    assert document["tokens_per_score"] == pytest.approx(sum(len(t.ids) + 1 for t in written) / 20, abs=0.01)
    figures = held_out_figures(reasoner.scorer, records, reasoning=3)
    assert figures["trace_ended"] == document["trace_ended"] and "trace_empty" in figures
    assert "trace_ended" not in held_out_figures(reasoner.scorer, records)


def test_grpo_has_no_gradient_through_the_distribution(reasoner: Reasoner, tmp_path: Path):
    made = task(reasoner, tmp_path, pointwise_loss=0.0, pairwise_loss=0.0, kl=0.0)
    batch = made.batch(0, [0, 1])
    read = reasoner.read(batch.images, batch.questions, batch.traces, tokens=True)
    rewards, _ = made._advantages(batch, read.logits.detach().unflatten(0, batch.drawn.shape))
    wanted = losses.policy_loss(read.log_probs, read.mask, rewards.flatten())
    weight = reasoner.scorer.model.get_input_embeddings().weight
    a, b = (torch.autograd.grad(x, weight)[0] for x in (made.step(batch).loss, wanted))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_parsed_reward_only_sees_the_level_in_the_text(reasoner: Reasoner, tmp_path: Path):
    from rewardtune.scorer.judgement_rewards import rewards, text_levels

    made = task(reasoner, tmp_path)
    batch = made.batch(0, [0, 1])
    levels = reasoner.scorer.levels
    logits = torch.randn(*batch.drawn.shape, len(levels), generator=torch.Generator().manual_seed(0))
    found, _ = rewards(batch, logits, levels, parsed=True, pointwise=1.0, pairwise=0.0)
    said = levels[text_levels(batch, logits)]
    assert set(said.flatten().tolist()) <= set(levels.tolist())
    wanted = 1 - (said - torch.tensor([p.ratings for p in batch.pairs])[..., None]).abs() / 4
    torch.testing.assert_close(found, wanted)
    # drawn from the distribution, not its peak
    share = torch.zeros(len(levels))
    one = logits[0, 0, 0].expand(*batch.drawn.shape, -1)
    for seed in range(800):
        drawn = torch.rand(batch.drawn.shape, generator=torch.Generator().manual_seed(seed))
        fresh = type(batch)(**{**vars(batch), "drawn": drawn})
        share += torch.bincount(text_levels(fresh, one).flatten(), minlength=len(levels))
    torch.testing.assert_close(share / share.sum(), logits[0, 0, 0].softmax(-1), atol=0.02, rtol=0)


def test_roll_outs_do_not_depend_on_the_micro_batch(reasoner: Reasoner, tmp_path: Path):
    made = task(reasoner, tmp_path)
    together = made.batch(0, [0, 1])
    apart = [made.batch(0, [i]) for i in (0, 1)]
    assert together.traces == [t for part in apart for t in part.traces]
    assert together.pairs == [p for part in apart for p in part.pairs]


def test_several_updates_share_a_roll_out_and_the_first_is_the_plain_one(reasoner: Reasoner, tmp_path: Path):
    plain = task(reasoner, tmp_path)
    several = task(reasoner, tmp_path, updates_per_rollout=2, clip=0.2)
    first, again, third = (several.batch(step, [step * 2, step * 2 + 1]) for step in (0, 1, 2))
    assert first is again and third.traces != first.traces
    a, b = plain.step(plain.batch(0, [0, 1])), several.step(first)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=1e-5)


def test_memory_brings_a_roll_out_back_after_the_weights_have_changed(reasoner: Reasoner, tmp_path: Path):
    made = task(reasoner, tmp_path, updates_per_rollout=2, clip=0.2, kl=0.1)
    first = made.batch(0, [0, 1])
    kept = {name: value.clone() for name, value in made.memory().items()}
    weight = reasoner.scorer.model.get_input_embeddings().weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight += 0.05 * torch.randn_like(weight)
        fresh = task(reasoner, tmp_path, updates_per_rollout=2, clip=0.2, kl=0.1)
        fresh.recall(1, kept)
        again = fresh.batch(1, [2, 3])
        assert again.traces == first.traces
        for name in ("old", "reference", "advantages", "levels"):
            assert torch.equal(getattr(again, name), getattr(first, name))
        assert torch.equal(fresh.reference.weights["scorer.model.language_model.embed_tokens.weight"], before)
    finally:
        with torch.no_grad():
            weight.copy_(before)


# ------------------------------------------------------------------------------------------------------------- records


def test_pairs_say_what_they_leave_out(reasoner: Reasoner, tmp_path: Path):
    found, left = make_pairs(groups(tmp_path, [[1.0, 1.0], [3.0], [2.0, 4.0]]), reasoner.scorer.rubric, target="hard",
                             preferences_in=None)  # fmt: skip
    assert len(found) == 4 and all(p.ratings == (4.0, 2.0) for p in found)
    assert found[0].images[0].name == "2-1.png"
    assert left.counts == {"equal scores": 4, "groups without a pair": 1, "groups of one picture": 1}
    assert [*left.lines()] == [
        f"equal scores: 4 ({'; '.join(f'group g0: 0-0.png and 0-1.png in {name}' for name in NAMES)})",
        "groups without a pair: 1 (group g0)", "groups of one picture: 1 (group g1)",
    ]  # fmt: skip


def without(group: PreferenceGroup, *missing: tuple[int, str]) -> PreferenceGroup:
    """A group some of whose pictures lack a dimension."""
    return replace(group, images=tuple(
        replace(image, scores={name: s for name, s in image.scores.items() if (i, name) not in missing})
        for i, image in enumerate(group.images)
    ))  # fmt: skip


def test_a_missing_dimension_makes_no_pair_and_is_named(
    reasoner: Reasoner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = groups(tmp_path, [[1.0, 4.5, 3.0], [2.0, 5.0]])
    # one of two lacks realism, in two pairs; both lack plausibility, in one
    made = [without(whole[0], (1, "realism")), without(whole[1], (0, "plausibility"), (1, "plausibility"))]
    write_records(made, tmp_path / "records.jsonl")
    pairs = read_pairs(tmp_path / "records.jsonl", reasoner.scorer.rubric, target="hard", preferences_in=None)
    counts = Counter((pair.prompt, NAMES[pair.dimension]) for pair in pairs)
    assert counts == {
        **{("a dog 0", name): 1 if name == "realism" else 3 for name in NAMES},
        **{("a dog 1", name): 1 for name in NAMES if name != "plausibility"},
    }
    assert capsys.readouterr().err.splitlines() == [
        "13 pairs; left out:",
        "  for want of a score in realism: 2 (group g0: 0-0.png and 0-1.png; group g0: 0-1.png and 0-2.png)",
        "  for want of a score in plausibility: 1 (group g1: 1-0.png and 1-1.png)",
    ]


def test_many_that_are_left_out_are_counted_and_the_first_named(reasoner: Reasoner, tmp_path: Path):
    made = [without(group, (0, "realism")) for group in groups(tmp_path, [[1.0, 2.0]] * 9)]
    _, left = make_pairs(made, reasoner.scorer.rubric, target="hard", preferences_in=None)
    (line,) = left.lines()
    assert line.startswith("for want of a score in realism: 9 (group g0: ") and line.endswith("4-1.png; and 4 more)")


def test_a_missing_dimension_is_named_by_sft_and_evaluate(
    reasoner: Reasoner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = groups(tmp_path, [[1.0, 4.5, 3.0], [2.0, 5.0]])
    made = [without(whole[0], (1, "realism"), *((2, name) for name in NAMES)), whole[1]]
    rows = rated_rows(made, target_maker("hard", reasoner.scorer.rubric), reasoner.scorer.rubric)
    assert [row.image.name for row in rows] == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    assert rows[1].target.isnan().any(-1).tolist() == [False, True, False, False]
    assert capsys.readouterr().err.splitlines() == [
        "4 rated pictures; left out:",
        "  scores in realism that are not there: 1 (group g0: 0-1.png)",
        "  pictures without a score: 1 (group g0: 0-2.png)",
    ]
    document = evaluate_groups(reasoner.scorer, made, resamples=0)
    assert document["dimensions"]["realism"]["pairs"] == 1 and document["dimensions"]["alignment"]["pairs"] == 2
    assert capsys.readouterr().err.splitlines() == [
        "15 scores to compare with; left out:",
        "  scores in realism that are not there: 1 (group g0: 0-1.png)",
    ]


def test_no_pair_at_all_is_an_error(reasoner: Reasoner):
    with pytest.raises(DataError, match="no two pictures of one prompt"):
        RewardGdso(reasoner, pairs=[], objective=GdsoSection(), batch_size=1, seed=0, base="x")


@pytest.mark.parametrize(("score", "target", "message"), [
    (5.5, "two-hot", "outside the rubric's scale of 1 to 5: 0-0.png alignment 5.5"),
    (3.25, "hard", "between the rubric's levels: 0-0.png alignment 3.25"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_named(reasoner: Reasoner, tmp_path: Path, score: float, target: str, message: str):
    made = groups(tmp_path, [[score, 2.0]])
    with pytest.raises(DataError, match=message):
        check_labels(made, reasoner.scorer.rubric, target=target)
    if score < 5:
        check_labels(made, reasoner.scorer.rubric, target="two-hot")


def test_preferences_alone_use_their_order(reasoner: Reasoner, tmp_path: Path):
    made = groups(tmp_path, [[1.0, 2.0]])[0]
    bare = PreferenceGroup(made.id, made.prompt, tuple(RatedImage(i.image) for i in made.images), ((1, 0),))
    with pytest.raises(DataError, match=r"objective\.preferences_in"):
        make_pairs([bare], reasoner.scorer.rubric, target="hard", preferences_in=None)
    pairs, _ = make_pairs([bare], reasoner.scorer.rubric, target="hard", preferences_in="realism")
    assert pairs == [Pair(made.prompt, (made.images[1].image, made.images[0].image), 1)]
    reasoner.scorer.model.requires_grad_(True)
    task = RewardGdso(reasoner, pairs=pairs, objective=GdsoSection(group_size=2, kl=0.0, policy=0.0), batch_size=1,
                      seed=0, base="x")  # fmt: skip
    batch = task.batch(0, [0])
    mu = reasoner.read(batch.images, batch.questions, batch.traces).logits.softmax(-1) @ reasoner.scorer.levels
    wanted = sum(-math.log(1 / (1 + math.exp(-float(mu[i] - mu[2 + k])))) for i in (0, 1) for k in (0, 1)) / 4
    assert float(task.step(batch).loss) == pytest.approx(0.5 * wanted, rel=1e-4)
