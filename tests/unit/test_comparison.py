"""Which of two pictures is better, on tiny Qwen3.5 and Qwen3-VL models: the question, the answer, learning it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_scorer import COMPARISON, NAMES, RUBRIC, as_qwen3_vl, pictures, tokenizer, write_comparer, write_scorer

from rewardtune.build import build_task
from rewardtune.data.images import open_image, to_pil, to_tensor
from rewardtune.errors import DataError, RecipeError
from rewardtune.recipe.sections import TASKS, DanceSection
from rewardtune.scorer.comparison import Comparer, PairQuestion, load_comparer, pair_accuracy
from rewardtune.scorer.model import load_scorer
from rewardtune.scorer.patches import patchify
from rewardtune.scorer.rubric import Rubric, comparison_reading, load_rubric
from rewardtune.scorer.targets import Pair
from rewardtune.tasks.reward_dance_pairs import Asked, RewardDancePairs
from rewardtune.types import Prompt


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_vl"])
def comparer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparer:
    folder = write_comparer(tmp_path_factory.mktemp(request.param), layers=["linear_attention", "full_attention"])
    if request.param == "qwen3_vl":
        as_qwen3_vl(folder)
    return load_comparer(load_scorer(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparer(tmp_path_factory.mktemp("comparer"), layers=["full_attention"] * 2)


IMAGES = [*pictures(2), *pictures(1, seed=3, size=(8, 32))]
REFERENCES = [*pictures(1, seed=5, size=(32, 8)), *pictures(2, seed=6)]
PROMPTS = ["a red dog", "two cats and a dog on the left of a red dog", ""]
DIMENSIONS = [0, 2, 3]


def by_hand(
    comparer: Comparer, image: torch.Tensor, reference: torch.Tensor, prompt: str, dimension: int, behind: str = ""
) -> torch.Tensor:
    """(L, V) logits of one row alone, written as one text and given as pixels in the order of the template."""
    scorer = comparer.scorer
    text = COMPARISON["template"].replace("{image}", "<|image_pad|>" * 4).replace("{reference}", "<|image_pad|>" * 4)
    text = text.replace("{prompt}", prompt).replace("{dimension}", NAMES[dimension]) + behind
    ids = torch.tensor([scorer.tokenizer.encode(text, add_special_tokens=False)])
    rows, grid = patchify([reference, image], scorer.geometry)
    return scorer.model(
        input_ids=ids, mm_token_type_ids=(ids == scorer.image_token).int(), pixel_values=rows, image_grid_thw=grid,
        use_cache=False,
    ).logits[0]  # fmt: skip


def answers(comparer: Comparer) -> list[int]:
    return [comparer.scorer.tokenizer.convert_tokens_to_ids(word) for word in "yn"]


# ---------------------------------------------------------------------------------------------------------- the answer


def test_the_answer_is_the_models_own_next_token_whatever_the_batch_mates(comparer: Comparer):
    found = comparer.logits(IMAGES, REFERENCES, PROMPTS, DIMENSIONS)
    assert found.shape == (3, 2)
    for n, row in enumerate(zip(IMAGES, REFERENCES, PROMPTS, DIMENSIONS, strict=True)):
        torch.testing.assert_close(found[n], by_hand(comparer, *row)[-1, answers(comparer)], atol=2e-5, rtol=1e-4)
    share = comparer.probability(IMAGES, REFERENCES, PROMPTS, DIMENSIONS)
    torch.testing.assert_close(share, (found[:, 0] - found[:, 1]).sigmoid())


def test_swapped_pictures_are_another_question(comparer: Comparer):
    questions = [PairQuestion(n, 3 + n, PROMPTS[n], DIMENSIONS[n]) for n in range(3)]
    read = comparer.read([*IMAGES, *REFERENCES], [q.swapped for q in questions]).logits
    torch.testing.assert_close(read, comparer.logits(REFERENCES, IMAGES, PROMPTS, DIMENSIONS), atol=2e-5, rtol=1e-4)
    one, other = (comparer.probability(*both, PROMPTS, DIMENSIONS) for both in ((IMAGES, REFERENCES),
                                                                             (REFERENCES, IMAGES)))  # fmt: skip
    assert (one - other).abs().min() > 1e-5 and (one + other - 1).abs().min() > 1e-5


def test_a_template_may_show_the_candidate_first(comparer: Comparer):
    """Features and grids follow the places in the text, not the order of the arguments."""
    scorer = comparer.scorer
    before, between, after = re.split(r"\{reference\}|\{image\}", COMPARISON["template"])
    turned = f"{before}{{image}}{between}{{reference}}{after}"
    rubric = Rubric.model_validate({**RUBRIC, "comparison": {**COMPARISON, "template": turned}})
    other = Comparer(scorer, comparison_reading(rubric, scorer.tokenizer))
    torch.testing.assert_close(
        other.logits(IMAGES, REFERENCES, PROMPTS, DIMENSIONS),
        comparer.logits(REFERENCES, IMAGES, PROMPTS, DIMENSIONS), atol=2e-5, rtol=1e-4,
    )  # fmt: skip


def test_each_picture_is_encoded_once_however_often_it_is_compared(comparer: Comparer, monkeypatch: pytest.MonkeyPatch):
    tower, seen = comparer.scorer.model.model.visual, []
    real = tower.forward
    monkeypatch.setattr(tower, "forward", lambda x, **kw: (seen.append(len(x)), real(x, **kw))[1])
    question = PairQuestion(0, 1, "a dog", 0)
    comparer.read(IMAGES[:2], [question, question.swapped, PairQuestion(1, 0, "a dog", 2)])
    assert seen == [2 * 16]


def test_gradient_reaches_the_pixels_of_both_pictures_and_no_others(comparer: Comparer):
    images, references = (pictures(2, seed=s).requires_grad_(True) for s in (0, 1))
    comparer.logits(images, references, PROMPTS[:2], [0, 1])[0].diff().sum().backward()
    for each in (images, references):
        assert each.grad[0].abs().max() > 1e-6 and each.grad[1].abs().max() == 0


# ------------------------------------------------------------------------------------------------------------ the task


def write_records(folder: Path, *, critiques: bool = True) -> Path:
    """Two groups of two pictures: the first is better in the first two dimensions and worse in the others."""
    rows = []
    for i, picture in enumerate(to_pil(pictures(4))):
        picture.save(folder / f"{i}.png")
        up = [4.0, 4.0, 2.0, 2.0] if i % 2 == 0 else [2.0, 2.0, 4.0, 4.0]
        row: dict[str, Any] = {"group": f"g{i // 2}", "prompt": f"a dog {i // 2}", "image": f"{i}.png"}
        row["scores"] = dict(zip(NAMES, up, strict=True))
        if critiques and i != 1:
            row["critique"] = f"it has {i} tails"
        rows.append(row)
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(folder: Path, records: Path, *, held_out: Path | None = None, rubric: Path | None = None,
          **objective: Any) -> RewardDancePairs:  # fmt: skip
    recipe = {
        "task": "reward_dance", "train": {"steps": 2, "batch_size": 2},
        "scorer": {"model": str(folder), "rubric": str(rubric) if rubric else None},
        "data": {"records": str(records), "held_out": str(held_out) if held_out else None},
        "objective": {"form": "pairwise", **objective},
    }  # fmt: skip
    return build_task(TASKS["reward_dance"].model_validate(recipe), device="cpu")


def test_the_step_is_written_out(folder: Path, tmp_path: Path):
    made = build(folder, write_records(tmp_path), explanation=0.7)
    assert len(made.pairs) == 8
    first = next(p for p in made.pairs if p.images[0].name == "0.png" and p.dimension == 1)
    third = next(p for p in made.pairs if p.images[0].name == "3.png" and p.dimension == 2)
    batch = [Asked(first, True), Asked(first, False), Asked(third, False), Asked(third, True)]
    decided, said, weight = torch.zeros(()), [], made.comparer.scorer.model.get_input_embeddings().weight
    words = made.comparer.scorer.tokenizer
    for asked in batch:
        candidate, other = asked.pair.images if asked.yes else reversed(asked.pair.images)
        pixels = [to_tensor([open_image(path)])[0] for path in (candidate, other)]
        number = int(candidate.stem)
        # the explanation is the candidate's and stands behind the right answer; nobody wrote one about picture 1
        spoken = f"\nit has {number} tails<|im_end|>" if number != 1 else ""
        behind = ("y" if asked.yes else "n") + spoken if spoken else ""
        logits = by_hand(made.comparer, *pixels, str(asked.pair.prompt), asked.pair.dimension, behind)
        ids = words.encode(behind, add_special_tokens=False)
        yes, no = logits[len(logits) - len(ids) - 1, answers(made.comparer)]
        decided = decided - ((yes - no) if asked.yes else (no - yes)).sigmoid().log() / 4
        at = logits[len(logits) - len(ids) :].log_softmax(-1)
        said += [-at[k, token] for k, token in enumerate(ids[1:])]
    output = made.step(batch)
    wanted = decided + 0.7 * torch.stack(said).mean()
    torch.testing.assert_close(output.loss, wanted, atol=1e-5, rtol=1e-4)
    assert output.metrics["answer_loss"] == pytest.approx(float(decided.detach()), abs=1e-5)
    a, b = (torch.autograd.grad(x, weight)[0] for x in (output.loss, wanted))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("critiques", [True, False])
def test_without_explanations_the_answer_alone_is_learned(folder: Path, tmp_path: Path, critiques: bool):
    made = build(folder, write_records(tmp_path, critiques=critiques), explanation=0.0 if critiques else 1.0)
    batch = made.batch(0, [0, 1, 2])
    output = made.step(batch)
    assert "explanation_loss" not in output.metrics
    total = 0.0
    for asked in batch:
        pixels = [to_tensor([open_image(path)])[0] for path in asked.pair.images]
        image, reference = pixels if asked.yes else reversed(pixels)
        yes = made.comparer.probability([image], [reference], [asked.pair.prompt], [asked.pair.dimension]).item()
        total -= math.log(yes if asked.yes else 1 - yes) / 3
    assert float(output.loss.detach()) == pytest.approx(total, abs=1e-5)


def test_places_say_nothing_and_are_named_by_the_sample(folder: Path, tmp_path: Path):
    made = build(folder, write_records(tmp_path))
    drawn = made.batch(0, range(400))
    assert drawn == [made.batch(7, [i])[0] for i in range(400)]
    for pair in made.pairs:
        mine = [asked.yes for asked in drawn if asked.pair == pair]
        assert len(mine) == 50 and 12 < sum(mine) < 38


def test_it_learns_to_order_pairs_and_an_export_orders_them_alike(folder: Path, tmp_path: Path):
    records = write_records(tmp_path, critiques=False)
    made = build(folder, records, held_out=records)
    made.pairs = [pair for pair in made.pairs if pair.dimension in (0, 2)]
    made.held_out = made.pairs
    before = made.evaluate()
    optimizer = torch.optim.AdamW(made.comparer.scorer.model.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        made.step(made.batch(step, range(8 * step, 8 * step + 8))).loss.backward()
        optimizer.step()
    after = made.evaluate()
    assert before["pair_accuracy"] < 1
    assert after == {"pair_accuracy": 1.0, "alignment/pair_accuracy": 1.0, "aesthetics/pair_accuracy": 1.0}
    made.export(tmp_path / "export", {"name": "tiny"})
    again = load_comparer(load_scorer(tmp_path / "export"))
    shown = to_tensor([open_image(path) for path in made.pairs[0].images])
    for one, other in (shown, shown.flip(0)):
        asked = ([one], [other], [made.pairs[0].prompt], [made.pairs[0].dimension])
        torch.testing.assert_close(again.probability(*asked), made.comparer.probability(*asked), atol=1e-6, rtol=1e-5)
    assert pair_accuracy(again, made.pairs, batch_size=3) == after
    card = (tmp_path / "export/README.md").read_text()
    assert "load_comparer" in card and "zreward" not in card and "on 4 pairs" in card


def test_accuracy_compares_both_orders(comparer: Comparer, tmp_path: Path):
    write_records(tmp_path)
    pairs = [Pair(Prompt("a dog"), (tmp_path / f"{a}.png", tmp_path / f"{b}.png"), d)
             for a, b in ((0, 1), (2, 3), (3, 0)) for d in range(4)]  # fmt: skip
    right = []
    for pair in pairs:
        won, lost = ([to_tensor([open_image(path)])[0]] for path in pair.images)
        odds = [comparer.logits(*both, [pair.prompt], [pair.dimension])[0] for both in ((won, lost), (lost, won))]
        right.append(bool(odds[0][0] - odds[0][1] > odds[1][0] - odds[1][1]))
    found = pair_accuracy(comparer, pairs, batch_size=5)
    assert found["pair_accuracy"] == sum(right) / 12 and 0 < sum(right) < 12
    assert found["realism/pair_accuracy"] == sum(right[1::4]) / 3
    turned = [Pair(p.prompt, p.images[::-1], p.dimension) for p in pairs]
    assert pair_accuracy(comparer, turned)["pair_accuracy"] == pytest.approx(1 - sum(right) / 12)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_rubric_that_does_not_compare_says_what_to_add(folder: Path, tmp_path: Path):
    plain = write_scorer(tmp_path / "plain", layers=["full_attention"])
    with pytest.raises(RecipeError, match=r"no `comparison` part.*add `comparison` with template, yes and no"):
        build(plain, write_records(tmp_path))
    # another rubric beside the same weights is enough
    made = build(plain, write_records(tmp_path), rubric=folder / "rubric.json")
    assert made.comparer.reading.answers == tuple(answers(made.comparer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yes": "yes"}, "'yes' is not one token in this model's tokenizer. Take a single word or letter"),
        ({"yes": "no", "no": "nay"}, "'no' and 'nay' is not one token"),
        ({"yes": "n"}, "'n' and 'n' are the same token"),
        ({"template": COMPARISON["template"] + "{dimension}"}, None),
        ({"template": "{reference} or {image}? {prompt}"}, "ends with {image}, {reference} or {prompt}; end it with"),
    ],
)
def test_answers_must_be_single_tokens(changes: dict[str, str], message: str | None):
    rubric = Rubric.model_validate({**RUBRIC, "comparison": {**COMPARISON, **changes}})
    if message is None:
        assert len(comparison_reading(rubric, tokenizer()).frames) == 4
    else:
        with pytest.raises(RecipeError, match=message):
            comparison_reading(rubric, tokenizer())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{image} {prompt} better?", r"comparison\.template must hold \{reference\} exactly once"),
        ("{image} {image} {reference} {prompt}", r"comparison\.template must hold \{image\} exactly once"),
        ("{prompt} {image}{reference} better?", "needs text between {image} and {reference}"),
        ("{reference}{prompt}{image} better?", "needs text between {image} and {reference}"),
        ("{image} {reference} {prompt} {criteria}", r"comparison\.template asks for \{criteria\}"),
    ],
)
def test_mistakes_in_the_question_are_named(tmp_path: Path, template: str, message: str):
    (tmp_path / "rubric.json").write_text(json.dumps({**RUBRIC, "comparison": {"template": template}}))
    with pytest.raises(RecipeError, match=message):
        load_rubric(tmp_path)


def test_records_without_pairs_are_refused(folder: Path, tmp_path: Path):
    lines = write_records(tmp_path).read_text().splitlines()
    alone = tmp_path / "alone.jsonl"
    alone.write_text(lines[0] + "\n" + lines[2] + "\n")
    with pytest.raises(DataError, match=r"hold no two pictures of one prompt.*set objective\.form to pointwise"):
        build(folder, alone)
    with pytest.raises(DataError, match=r"alone\.jsonl holds no two pictures.*leave data\.held_out out"):
        build(folder, tmp_path / "records.jsonl", held_out=alone)


def test_preferences_without_scores_need_their_dimension(folder: Path, tmp_path: Path):
    write_records(tmp_path)
    stated = tmp_path / "stated.jsonl"
    stated.write_text(json.dumps({"prompt": "a dog", "chosen": "2.png", "rejected": "0.png"}) + "\n")
    with pytest.raises(DataError, match=r"objective\.preferences_in"):
        build(folder, stated)
    (pair,) = build(folder, stated, preferences_in="realism").pairs
    assert (pair.dimension, [path.name for path in pair.images]) == (1, ["2.png", "0.png"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"form": "pairwise", "target": "two-hot"}, "leave target out"),
        ({"preferences_in": "realism"}, "leave preferences_in out"),
    ],
)
def test_settings_of_the_other_form_are_refused(section: dict[str, str], message: str):
    with pytest.raises(ValidationError, match=message):
        DanceSection.model_validate(section)
    # a recorded recipe holds every default and is read again on resume
    whole = DanceSection(form="pairwise").model_dump()
    assert DanceSection.model_validate(whole).form == "pairwise"
