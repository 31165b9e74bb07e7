"""Several rewards, ceilings, relative rewards and what holds the model to its start, on the direct_reward task."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch
from test_direct_reward import Redness, build

from rewardtune.build import build_term
from rewardtune.errors import RecipeError
from rewardtune.plugins import Guidance, RewardCard
from rewardtune.recipe.file import load_recipe
from rewardtune.scoring.mixing import Mixing
from rewardtune.scoring.reward_set import Relative, RewardSet, Term
from rewardtune.types import Score

DRAFT = ("draft", {"last_steps": 2, "memory": "flat"})


class Green:
    """A thousand times the green channel."""

    card = RewardCard("green", "green", differentiable=True, needs_prompt=False, range=None)

    def score(self, images, prompts):
        return Score(1000 * images[:, 1].mean((1, 2)))


class Wordy:
    """Brightness times the length of the prompt."""

    card = RewardCard("wordy", "length", differentiable=True, needs_prompt=True, range=None)

    def score(self, images, prompts):
        return Score(images.mean((1, 2, 3)) * torch.tensor([float(len(p)) for p in prompts]))


def slope(task) -> tuple[torch.Tensor, dict]:
    out = task.step(task.batch(0, range(3)))
    parameters = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None]), {**out.metrics, "loss": float(out.loss)}


def test_several_rewards_by_value_have_the_sum_of_their_gradients():
    terms = [Term(Redness(), 2.0), Term(Green(), 0.01)]
    both, metrics = slope(build(*DRAFT, rewards=RewardSet(terms)))
    parts = [slope(build(*DRAFT, rewards=RewardSet([term])))[0] for term in terms]
    assert (both - sum(parts)).norm() <= 1e-5 * both.norm()
    assert metrics["loss"] == pytest.approx(-metrics["objective"])
    assert {"gradient/redness", "gradient/green", "cosine/redness/green"} <= set(metrics)
    assert -1 <= metrics["cosine/redness/green"] <= 1


def test_balanced_by_gradient_a_large_reward_drowns_no_other():
    rewards = {"red": Redness(), "green": Green()}
    singles = {n: slope(build(*DRAFT, rewards=RewardSet([Term(r), Term(r, 0.0)]))) for n, r in rewards.items()}
    norms = {"red": singles["red"][1]["gradient/redness"], "green": singles["green"][1]["gradient/green"]}
    both, _ = slope(build(*DRAFT, rewards=RewardSet([Term(Redness(), 3.0), Term(Green())]), balance="gradient"))
    wanted = 3.0 * singles["red"][0] / norms["red"] + singles["green"][0] / norms["green"]
    assert (both - wanted).norm() <= 1e-4 * wanted.norm()


def test_balanced_gradients_do_not_grow_with_the_number_of_parts():
    """Micro-batches and processes: rewards of the same slope everywhere, so every part's norm is as the whole's."""
    rewards = RewardSet([Term(Redness(), 3.0), Term(Green())])
    task = build(*DRAFT, rewards=rewards, balance="gradient", batch_size=4)
    parameters = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]

    def slope_of(indices):
        out = task.step(task.batch(0, indices))
        found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None]), out.metrics["gradient/green"]

    whole, norm = slope_of(range(4))
    for parts in ([range(2), range(2, 4)], [[0], [1], [2], [3]]):
        found = [slope_of(part) for part in parts]
        mean = sum(one for one, _ in found) / len(parts)
        assert (mean - whole).norm() <= 1e-5 * whole.norm()
        assert [n for _, n in found] == pytest.approx([norm] * len(parts))


def test_a_gradient_whose_norm_overflows_is_not_left_out_without_a_word():
    """Divided by infinity it would be zero, and the step would be that of the other reward alone."""

    class Steep:
        card = RewardCard("steep", "", differentiable=True, needs_prompt=False, range=None)

        def score(self, images, prompts):
            return Score(1e25 * images[:, 1].mean((1, 2)))

    rewards = RewardSet([Term(Redness()), Term(Steep())])
    found, _, metrics = rewards.gradient(pictures(), [""] * 5, None, balance="gradient")
    assert metrics["gradient/steep"] == float("inf") and found.isnan().all()


def test_a_ceiling_stops_the_gradient_of_images_that_reach_it():
    free, _ = slope(build(*DRAFT))
    stopped, _ = slope(build(*DRAFT, rewards=RewardSet([Term(Redness(), ceiling=-2.0)])))
    above, _ = slope(build(*DRAFT, rewards=RewardSet([Term(Redness(), ceiling=2.0)])))
    assert not stopped.any()
    assert torch.equal(free, above)


def test_a_relative_reward_is_the_difference_under_two_phrases():
    relative = Relative("bright", "dim", k=0.5)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    value, _ = RewardSet([Term(Wordy(), relative=relative)]).score(images, ["dog", "two cats"])
    lengths = torch.tensor([1.5 * len("bright. ") + 0.5 * n - len("dim. ") for n in (3, 8)])
    assert torch.allclose(value, images.mean((1, 2, 3)) * lengths)


@pytest.mark.parametrize("guidance", [Guidance("off"), Guidance("detached-negative", 2.0)], ids=lambda g: g.mode)
def test_the_pull_to_the_start_is_the_mean_squared_distance_to_a_model_without_adapters(guidance):
    """Written out on a second, untouched pipeline and by the transformer alone; the way back by the chain rule."""
    task = build(*DRAFT, velocity=0.7)
    task.guidance = guidance
    assert slope(task)[1]["velocity"] == 0.0  # adapters start without effect
    transformer, other = task.trainable["transformer"], tiny.z_image()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    batch, scale = task.batch(0, range(3)), guidance.scale if guidance.mode != "off" else 0.0
    positive, negative = other.encode_prompt([str(p) for p in batch.prompts], do_classifier_free_guidance=True)

    def velocity(model, latents, time):
        """Towards the noise, as the scheduler has it; the negative prompt's part carries no gradient."""
        images = list(latents.unsqueeze(2))
        towards = torch.stack(model(images, (1 - time).expand(3), positive, return_dict=False)[0]).squeeze(2)
        if scale:
            with torch.no_grad():
                away = torch.stack(model(images, (1 - time).expand(3), negative, return_dict=False)[0]).squeeze(2)
            towards = towards + scale * (towards - away)
        return -towards

    sigmas = task.pipeline.timesteps(4, (16, 16))[0].sigmas
    latents, wanted = batch.noise, []
    for start, end in pairwise(sigmas):
        with torch.no_grad():
            frozen = velocity(other.transformer, latents, start)
        trained = velocity(transformer, latents, start)
        apart = trained.detach() - frozen
        value = float((apart * apart).sum()) / apart.numel()
        pull = torch.autograd.grad(trained, parameters, 2 * apart / apart.numel(), allow_unused=True)
        wanted.append((value, torch.cat([g.flatten() for g in pull if g is not None])))
        latents = latents + (end - start) * trained.detach()
    pulled, metrics = slope(task)
    task.velocity = 0.0
    plain, without = slope(task)
    near = [i for i, (value, _) in enumerate(wanted) if metrics["velocity"] == pytest.approx(value, rel=1e-4)]
    assert len(near) == 1, "one step of the roll-out"
    value, pull = wanted[near[0]]
    assert metrics["loss"] - without["loss"] == pytest.approx(0.7 * value, rel=1e-3)
    assert (pulled - plain - 0.7 * pull).norm() <= 1e-3 * 0.7 * pull.norm()
    assert 0.7 * pull.norm() > 1e-2 * plain.norm(), "too small a share of the gradient to be judged by the difference"


def test_the_pull_to_the_start_visits_other_steps_from_batch_to_batch():
    task = build(*DRAFT, velocity=1.0)
    seen = set()

    def record(chain, step):
        predict = chain.predict
        chain.predict = lambda i, latents: seen.add(i) or predict(i, latents)
        return torch.zeros(())

    distance = task._distance
    task._distance = lambda chain, step: record(chain, step) + distance(chain, step)
    for step in range(8):
        task.step(task.batch(step, [0]))
    assert len(seen) > 1 and seen <= set(range(4))


def test_sft_beside_the_reward_adds_its_weighted_loss(tmp_path):
    from PIL import Image

    from rewardtune.data.records import CaptionedImage
    from rewardtune.tasks.sft import Sft

    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    task = build(*DRAFT)
    plain, _ = slope(task)
    sft = Sft(
        task.pipeline, trainable=task.trainable, rows=[CaptionedImage(tmp_path / "a.png", "dog")], size=(16, 16),
        cache_latents=True, caption_dropout=0.0, timestep_density="uniform", seed=0, samples=lambda: None,
        export=lambda *_: None,
    )  # fmt: skip
    loss = sft.step(sft.batch(0, range(3))).loss
    parameters = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]
    extra = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None])
    task.sft = (sft, 0.25)
    mixed, metrics = slope(task)
    assert metrics["sft_loss"] == pytest.approx(float(loss))
    assert (mixed - plain - 0.25 * extra).norm() <= 1e-5 * mixed.norm()


class Smooth:
    """A curved reward of each image alone, and how many images it saw at once."""

    def __init__(self, name: str, channel: int, higher: bool = True) -> None:
        self.card = RewardCard(
            name, "a channel", differentiable=True, needs_prompt=False, range=None, scale=2.0, higher_is_better=higher
        )
        self.channel, self.seen = channel, []

    def score(self, images, prompts):
        self.seen.append(len(images))
        value = (3 * images[:, self.channel]).sin().mean((1, 2))
        return Score(value, parts={"twice": 2 * value})


def pictures(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(3))


MIXINGS = {
    "sum": lambda u: u.sum(0),
    "min": lambda u: u.amin(0),
    "soft-min": lambda u: -0.2 * (-u / 0.2).exp().mean(0).log(),
}


@pytest.mark.parametrize("kind", MIXINGS)
def test_values_are_mixed_by_their_formula_and_so_are_gradients(kind):
    red, blue = Smooth("red", 0), Smooth("blue", 2, higher=False)
    images, prompts = pictures().requires_grad_(True), [""] * 5
    values = [reward.score(images, prompts).value for reward in (red, blue)]
    middle = [float(value.mean()) for value in values]
    terms = [Term(red, 2.0, offset=middle[0]), Term(blue, 1.0, offset=middle[1], batch_size=2)]
    rewards = RewardSet(terms, Mixing(kind, 0.2))
    u = torch.stack([2.0 * (values[0] - middle[0]) / 2, -(values[1] - middle[1]) / 2])
    wanted = MIXINGS[kind](u)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    (slope,) = torch.autograd.grad((weights * wanted).mean(), images)
    assert len({int(i) for i in u.argmin(0)}) == 2, "both are the smallest somewhere"
    value, _ = rewards.score(images.detach(), prompts)
    assert torch.allclose(value, wanted, atol=1e-6)
    gradient, value, metrics = rewards.gradient(images, prompts, weights, balance="value")
    assert torch.allclose(value, wanted, atol=1e-6)
    assert torch.allclose(gradient, slope, atol=1e-7)
    assert {"reward/red", "reward/blue"} <= set(metrics)


def test_soft_min_lies_between_the_smallest_and_the_mean():
    u = [torch.tensor([0.0, 1.0]), torch.tensor([0.4, 1.0])]
    assert torch.allclose(Mixing("soft-min", 1e-3).value(u), torch.tensor([0.0, 1.0]), atol=1e-3)
    assert torch.allclose(Mixing("soft-min", 1e3).value(u), torch.tensor([0.2, 1.0]), atol=1e-3)
    assert torch.allclose(sum(Mixing("soft-min", 0.3).shares(u)), torch.ones(2))


@pytest.mark.parametrize("relative", [None, Relative("bright", "dim", k=0.5)])
def test_groups_have_the_same_values_metrics_and_gradients(relative):
    images, prompts = pictures().requires_grad_(True), [str(i) * i for i in range(5)]
    inner = Wordy() if relative else Smooth("red", 0)
    found = []
    for size in (None, 2, 5, 1):
        value, metrics = RewardSet([Term(inner, 0.7, relative=relative, batch_size=size)]).score(images, prompts)
        (slope,) = torch.autograd.grad((value * torch.arange(5)).sum(), images)
        found.append((value.detach(), slope, metrics))
    for value, slope, metrics in found[1:]:
        assert torch.allclose(value, found[0][0], atol=1e-6)
        assert torch.allclose(slope, found[0][1], atol=1e-6)
        assert metrics == pytest.approx(found[0][2], rel=1e-5)
    if relative is None:
        assert inner.seen == [5, 2, 2, 1, 5, 1, 1, 1, 1, 1]


def test_groups_hold_one_graph_at_a_time():
    held: list[int] = []

    class Counting:
        card = Smooth("red", 0).card

        def score(self, images, prompts):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(1) or t, lambda t: t):
                value = Score(images.pow(2).mean((1, 2, 3)))
            return value

    images = pictures().requires_grad_(True)
    value, _ = RewardSet([Term(Counting(), batch_size=1)]).score(images, [""] * 5)
    nodes, todo = 0, [value.grad_fn]
    while todo:
        node = todo.pop()
        nodes += 1
        todo += [after for after, _ in node.next_functions if after is not None]
    assert len(held) >= 5 and nodes < 8, "what is left is the groups' own node, not the five graphs"


def test_groups_work_without_a_graph():
    inner = Smooth("red", 0)
    with torch.no_grad():
        value, _ = RewardSet([Term(inner, batch_size=2)]).score(pictures(), [""] * 5)
    assert not value.requires_grad and inner.seen == [2, 2, 1]


class Narrow(Smooth):
    """Has room for `room` images, on the way there or on the way back."""

    def __init__(self, room: int, *, back: bool) -> None:
        super().__init__("narrow", 0)
        self.room, self.back = room, back

    def score(self, images, prompts):
        score = super().score(images, prompts)
        if len(images) <= self.room:
            return score
        if not self.back:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def no_room(_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        score.value.register_hook(no_room)
        return score


@pytest.mark.parametrize("back", [False, True])
def test_where_memory_runs_out_a_reward_sees_fewer_images(back, capsys):
    images, prompts = pictures().requires_grad_(True), [""] * 5
    wide, narrow = Smooth("red", 0), Narrow(2, back=back)
    plain = RewardSet([Term(wide, 3.0), Term(Smooth("narrow", 0))])
    wanted, numbers, _ = plain.gradient(images, prompts, None, balance="value")
    rewards = RewardSet([Term(wide, 3.0), Term(narrow)])
    found, value, _ = rewards.gradient(images, prompts, None, balance="value")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(value, numbers)
    told = capsys.readouterr().err
    assert [f"no memory for {n} images" in told for n in (5, 3, 2)] == [True, True, False]
    assert "reward 'narrow'" in told and "`batch_size: 2`" in told
    rewards.gradient(images, prompts, None, balance="value")
    assert narrow.seen == [5, 3, 2, 2, 1, 2, 2, 1], "kept for the rest of the run"
    if not back:
        value, _ = RewardSet([Term(Narrow(2, back=False))]).score(images, prompts)
        assert torch.autograd.grad(value.mean(), images)[0].abs().sum() > 0


def test_one_image_that_is_too_much_is_said_so():
    with pytest.raises(torch.OutOfMemoryError):
        RewardSet([Term(Narrow(0, back=False))]).score(pictures(), [""] * 5)


RECIPE = "pocket/zreward"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["mixing.kind=min"], "there is one"),
        (
            ['rewards=[{"name": "zreward"}, {"name": "zreward"}]', "mixing.kind=min", "balance=gradient"],
            "leave one out",
        ),
        (['rewards=[{"name": "zreward", "weight": -1}, {"name": "zreward"}]', "mixing.kind=min"], "above 0"),
        (["mixing.kind=soft-min", "mixing.temperature=0"], "temperature"),
        (["mixing.kind=max"], "mixing"),
    ],
)
def test_mixings_that_mean_nothing_are_refused(overrides, told):
    with pytest.raises(RecipeError, match=told):
        load_recipe(RECIPE, overrides)


def test_a_recipe_mixes_by_soft_min_in_groups():
    rewards = '[{"name": "zreward", "offset": 3, "batch_size": 2}, {"name": "zreward", "weight": 2, "batch_size": 1}]'
    recipe = load_recipe(RECIPE, [f"rewards={rewards}", "mixing.kind=soft-min", "mixing.temperature=0.3"]).recipe
    terms = [build_term(section, device="cpu") for section in recipe.rewards]
    assert [(term.offset, term.batch_size) for term in terms] == [(3.0, 2), (0.0, 1)]
    assert Mixing(**recipe.mixing.model_dump()) == Mixing("soft-min", 0.3)
