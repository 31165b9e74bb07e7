"""Recipes: YAML as we read it, overrides, and every mistake with its place and a way out."""

from __future__ import annotations

import importlib.machinery
import json
import re
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardtune import registry
from rewardtune.errors import DataError, RecipeError
from rewardtune.plugins import Options, RewardCard
from rewardtune.recipe.file import format_overrides, load_recipe, recipe_schema
from rewardtune.recipe.gradients import DraftSection
from rewardtune.recipe.sections import TASKS
from rewardtune.recipe.strict_yaml import parse

GOOD = """\
# a comment
task: direct_reward
pipeline:
  model: some/hub-id
lora: {rank: 8}
data:
  prompts: prompts.txt
gradient:
  method: draft
  last_steps: 3
rewards:
  - name: zreward
    weight: 2
optimizer: {lr: 1e-4}
train:
  steps: 10
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe and returns its path; the prompt file that GOOD names lies beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red fox\n")

    def write(text: str = GOOD, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def mistakes_of(path: Path, *overrides: str, files: bool = True, kind=RecipeError) -> str:
    with pytest.raises(kind) as caught:
        load_recipe(path, overrides, files=files)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-2", -2),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),
        ("1_000", "1_000"),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("'true'", "true"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("12:30", "12:30"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_plain_scalars_follow_the_yaml_1_2_core_schema(text, value):
    found = parse(f"key: {text}\n", name="x").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_merge_key_is_an_ordinary_key():
    assert parse("a: {<<: 3}", name="x").data == {"a": {"<<": 3}}


def test_every_key_and_entry_knows_its_line():
    lines = parse("a:\n  b: 1\n  c:\n    - x\n    - d: 2\n", name="x").lines
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5, ("a", "c", 1, "d"): 5}


def test_aliases_give_copies():
    data = parse("a: &x {k: 1}\nb: *x\n", name="x").data
    data["b"]["k"] = 2
    assert data["a"] == {"k": 1}


ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIAS_BOMB, "expand to more than 10,000 values"),
        ("a: &a [x]\nb: [" + ", ".join(["*a"] * 101) + "]", "more than 100 aliases"),
        ("a: &a [*a]", "nested deeper than 32 levels"),
        ("[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("a: [" + "1, " * 30_000 + "1]", "more than 10,000 values"),
        ("a: " + "x" * 1_100_000, "more than a recipe may have"),
        ("task: !!python/object/apply:os.system [echo]", "tag"),
        ("task: !custom x", "tag"),
        ("a: [1", "not valid YAML"),
        ("a: b: c", "1: this is not valid YAML"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_hostile_or_broken_yaml_is_refused_quickly(recipe, text, said):
    path = recipe(text)
    started = time.perf_counter()
    assert said in mistakes_of(path)
    # Generous for a busy machine; expanding the bomb would take hours.
    assert time.perf_counter() - started < 20


def test_an_empty_recipe_and_a_list_are_no_recipes(recipe):
    assert "a mapping of sections" in mistakes_of(recipe(""))
    assert "a mapping of sections" in mistakes_of(recipe("- a\n- b\n"))


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"task: \xff\xfe")
    assert "not UTF-8" in mistakes_of(path)


# ---------------------------------------------------------------------------------------------------------- good ones


def test_a_good_recipe_loads_with_defaults_and_provenance(recipe):
    path = recipe()
    loaded = load_recipe(path, files=True)
    assert loaded.recipe.train.steps == 10
    assert loaded.recipe.optimizer.lr == 1e-4
    assert isinstance(loaded.recipe.gradient, DraftSection)
    assert loaded.recipe.rollout.guidance == "detached-negative"
    assert (loaded.name, loaded.source, loaded.text) == ("recipe", path, GOOD)
    assert loaded.resolved["train"]["batch_size"] == 1


def test_the_hash_is_of_the_content_not_of_its_form(recipe):
    first = load_recipe(recipe()).sha256
    same = GOOD.replace("# a comment\n", "").replace("lora: {rank: 8}", "lora:\n  rank: 8\n  alpha: null")
    assert load_recipe(recipe(same)).sha256 == first
    assert load_recipe(recipe(GOOD), ["train.steps=10"]).sha256 == first
    assert load_recipe(recipe(GOOD), ["train.steps=11"]).sha256 != first


def test_off_is_a_word_where_a_word_is_meant(recipe):
    loaded = load_recipe(recipe(GOOD + "track: {wandb: off}\nrollout: {guidance: off}\n"))
    assert loaded.recipe.track.wandb == "off"
    assert loaded.recipe.rollout.guidance == "off"


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_change_values_and_are_recorded(recipe):
    overrides = [
        "train.steps=50",
        "optimizer.lr=1e-5",
        "rewards.0.weight=0.5",
        "gradient={method: refl}",
        "rewards.0.statistic.kind=lower-tail-mean",
        "samples.prompts=[a cat, a dog]",
    ]
    loaded = load_recipe(recipe(), overrides)
    assert loaded.recipe.train.steps == 50
    assert loaded.recipe.optimizer.lr == 1e-5
    assert loaded.recipe.rewards[0].weight == 0.5
    assert loaded.recipe.rewards[0].statistic.share == 0.25
    assert loaded.recipe.gradient.method == "refl"
    assert loaded.recipe.samples.prompts == ["a cat", "a dog"]
    assert loaded.overrides == tuple(overrides)
    assert loaded.text == GOOD


def test_an_override_reaches_one_of_two_aliased_places_only(recipe):
    text = GOOD.replace("rewards:\n", "rewards:\n  - &r {name: zreward}\n  - *r\n")
    loaded = load_recipe(recipe(text), ["rewards.0.weight=7"])
    assert [reward.weight for reward in loaded.recipe.rewards] == [7, 1, 2]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "override 'train.stepz=3': key 'stepz' unknown in train; did you mean 'steps'?"),
        ("train.steps=many", "override 'train.steps=many': train.steps is the text 'many'; expected a whole number"),
        ("rewards.3.weight=1", "'3' is no entry of rewards, which has entries 0 to 0"),
        ("train.steps.x=1", "train.steps is 10, so it has no 'x'"),
        ("train.steps", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("train..steps=3", "write it as section.key=value"),
        ("train.steps=[1", "override 'train.steps=[1': this is not valid YAML"),
        ("train.steps=!!int 3", "override 'train.steps=!!int 3': a YAML tag"),
        ("train={steps: many}", "override 'train={steps: many}': train.steps is the text 'many'"),
        ("train={steps: 1, steps: 2}", "override 'train={steps: 1, steps: 2}': key 'steps' is given twice."),
        ("trian.steps=3", "override 'trian.steps=3': key 'trian' unknown in a recipe of task direct_reward; did you"),
        ("guard.every=5", "override 'guard.every=5': key 'prompts' is missing in guard"),
        ("rollout.steps=2", "override 'rollout.steps=2': gradient.last_steps 3 exceeds rollout.steps 2"),
        ("full={}", "override 'full={}': name one of `lora:` (adapters) and `full:`"),
    ],
)
def test_wrong_overrides_are_refused_as_such(recipe, override, said):
    text = mistakes_of(recipe(), override)
    assert said in text and "recipe.yaml" not in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("samples=null", "samples is empty; expected a section of keys and values; no samples are drawn with samples."),
        ("samples=off", "no samples are drawn with samples.prompts=[]."),
        ("checkpoint=null", "checkpoint is empty; expected a section of keys and values; leave it out, or write {}, "),
        ("train=null", "train is empty; expected a section of keys and values."),
    ],
)
def test_an_empty_section_is_told_what_to_write(recipe, override, said):
    assert said in mistakes_of(recipe(), override)
    load_recipe(recipe(), ["samples.prompts=[]", "checkpoint={}"])


def test_an_override_that_does_not_fit_a_line_of_the_file_is_named_with_it(recipe):
    text = GOOD.replace("  - name: zreward\n    weight: 2", "  - {name: zreward}\n  - {name: warmth}")
    said = mistakes_of(recipe(text.replace("rank: 8", "rank: x")), "task=sft", "train.steps=5").splitlines()
    assert said[0].endswith("recipe.yaml and the overrides have 6 mistakes.")
    places = [line.split(": ")[0] for line in said[1:]]
    assert places[0].endswith("recipe.yaml:5") and places[1].endswith("recipe.yaml:13")  # their own
    assert all(re.fullmatch(r"override 'task=sft' with \S*recipe\.yaml:\d+", place) for place in places[2:])


def test_what_a_later_override_replaces_is_not_blamed(recipe):
    said = mistakes_of(recipe(), "train.steps=many", "train={steps: 5, batch_size: 0}")
    assert said == "override 'train={steps: 5, batch_size: 0}': train.batch_size is 0; expected more than 0."
    load_recipe(recipe(), ["train.steps=many", "train.steps=5"])


def test_overrides_that_do_not_fit_each_other_are_named_together(recipe):
    said = mistakes_of(recipe(), "train.shard=true", "train.seed=1", "train.compile=true")
    assert said.startswith("override 'train.shard=true' and override 'train.compile=true' with ")


def test_python_overrides_read_like_the_command_line(recipe):
    words = format_overrides({"train.steps": 5, "optimizer.lr": 1e-5, "samples.prompts": ["a"], "lora.alpha": None})
    loaded = load_recipe(recipe(), words)
    assert (loaded.recipe.train.steps, loaded.recipe.optimizer.lr, loaded.recipe.samples.prompts) == (5, 1e-5, ["a"])


# ------------------------------------------------------------------------------------------------------------ packages


@pytest.mark.parametrize(
    ("override", "absent", "said"),
    [
        ("track.wandb=offline", "wandb", "track.wandb needs wandb, which is not installed: pip install wandb; or"),
        ("track.wandb=online", "wandb", "pip install wandb; or write track.wandb: off. The numbers"),
        (
            "track.tensorboard=true",
            "tensorboard",
            "pip install 'rewardtune[tensorboard]'; or write track.tensorboard: false. The numbers",
        ),
        ("optimizer.name=adamw8bit", "bitsandbytes", "needs bitsandbytes, which is not installed: pip install bits"),
        ("optimizer.name=prodigy", "prodigyopt", "needs prodigyopt, which is not installed: pip install prodigyopt."),
    ],
)
def test_a_package_that_a_setting_needs_is_asked_for_before_anything_loads(recipe, monkeypatch, override, absent, said):
    for module in ("bitsandbytes", "prodigyopt", "wandb", "tensorboard", "tensorboardX"):
        there = importlib.machinery.ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(__spec__=there))
    load_recipe(recipe(), [override])
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setitem(sys.modules, f"{absent}X", None)
    text = mistakes_of(recipe(), override, files=False)
    assert text.startswith(f"override '{override}': ") and said in text
    load_recipe(recipe(), ["track.wandb=off", "track.tensorboard=false", "optimizer.name=muon"])


def test_an_optimiser_that_is_not_known_is_told_with_the_known_ones(recipe):
    said = mistakes_of(recipe(), "optimizer.name=adam")
    assert said.endswith("'adam' is unknown (there are adamw, adamw8bit, muon, prodigy); did you mean 'adamw'?")


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("optimizer: {lr: 1e-4}", "optimizer: {lr_rate: 1}", ":14: key 'lr_rate' unknown in optimizer"),
        ("  steps: 10", "  stpes: 10", ":16: key 'stpes' unknown in train; did you mean 'steps'?"),
        ("  steps: 10", "  steps: 10\n  lr: 1", ":17: key 'lr' unknown in train; it belongs to optimizer"),
        (
            "lora: {rank: 8}",
            "lora: {rank: 8}\nrolout: {}",
            ":6: key 'rolout' unknown in a recipe of task direct_reward;",
        ),
        ("  steps: 10", "  steps: many", ":16: train.steps is the text 'many'; expected a whole number."),
        ("  steps: 10", "  steps: '10'", ":16: train.steps is the text '10'; expected a whole number."),
        ("  steps: 10", "  steps: true", ":16: train.steps is true; expected a whole number."),
        ("  steps: 10", "  steps: 1.5", ":16: train.steps is 1.5; expected a whole number."),
        ("  steps: 10", "  steps: -5", ":16: train.steps is -5; expected more than 0."),
        ("  steps: 10", "  steps: [10]", ":16: train.steps is a list of 1; expected a whole number."),
        ("  steps: 10", "  steps:", ":16: train.steps is empty; expected a whole number."),
        ("  steps: 10", "  steps: 10\n  steps: 20", ":17: key 'steps' is given twice (first on line 16)."),
        ("  steps: 10", "  seed: 1", ":15: key 'steps' is missing in train."),
        ("train:\n  steps: 10", "", "key 'train' is missing."),
        ("  steps: 10", "  steps: 10\n  max_grad_norm: .inf", ":17: .inf is not a finite number."),
        ("{lr: 1e-4}", "fast", ":14: optimizer is the text 'fast'; expected a section of keys and values."),
        ("{lr: 1e-4}", "{betas: [0.9, x]}", ":14: optimizer.betas.1 is the text 'x'; expected a number."),
        (
            "last_steps: 3",
            "last_steps: some",
            ":10: gradient.last_steps is the text 'some'; expected a whole number or",
        ),
        ("last_steps: 3", "last_steps: 30", "gradient.last_steps 30 exceeds rollout.steps 20"),
        (
            "method: draft",
            "method: draff",
            "flowbp_sparse); did you mean 'draft'?",
        ),
        ("method: draft", "kind: draft", ":8: key 'method' is missing in gradient."),
        ("lora: {rank: 8}", "", "name one of `lora:` (adapters) and `full:` (whole modules)"),
        ("task: direct_reward", "task: direct_rewards", ":2: task 'direct_rewards' is unknown"),
        ("task: direct_reward\n", "", "key 'task' is missing"),
        ("name: zreward", "name: zrewrd", ":12: reward 'zrewrd' is unknown"),
        (
            "name: zreward",
            "name: pocket-oracle",
            ":12: reward 'pocket-oracle' returns no gradient, so task direct_reward",
        ),
        ("name: zreward", "name: 'os:system'", ":12: reward 'os:system' looks like something to import"),
        (
            "weight: 2",
            "options: {chekpoint: x}",
            "key 'chekpoint' unknown in rewards.0.options; did you mean 'checkpoint'?",
        ),
        ("weight: 2", "options: {dtype: float16}", "rewards.0.options.dtype is the text 'float16' (it can be float32,"),
        ("weight: 2", "dimensions: {realsm: 1}", ":13: dimension 'realsm' unknown in 'zreward'"),
        ("weight: 2", "dimensions: {realism: 0}", "needs a weight other than zero"),
        ("weight: 2", "statistic: {kind: exceedance, threshold: 9}", "a threshold of 9 is always or never reached"),
        ("model: some/hub-id", "model: ./nowhere", ":4: model './nowhere': there is no such folder"),
        ("model: some/hub-id", "model: pocket:nothing", "'pocket:nothing' does not ship with rewardtune"),
        ("model: some/hub-id", "model: .", "holds no model_index.json"),
        ("  model: some/hub-id", "  model: a/b\n  family: zimage", ":5: pipeline 'zimage' is unknown"),
        ("prompts: prompts.txt", "prompts: nowhere.txt", ":7: data.prompts: there is no file 'nowhere.txt'"),
    ],
)
def test_each_mistake_has_its_place_and_a_way_out(recipe, old, new, said):
    assert GOOD.count(old) == 1
    text = mistakes_of(recipe(GOOD.replace(old, new)))
    assert said in text
    assert "recipe.yaml" in text
    assert "pydantic" not in text
    assert "Traceback" not in text


def test_the_judges_place_is_named_as_the_way_out(recipe):
    text = mistakes_of(recipe(GOOD.replace("name: zreward", "name: pocket-oracle")))
    assert "move it to compare.rewards" in text
    moved = GOOD + "compare:\n  judge: pocket-oracle\n  rewards: [{name: pocket-oracle}]\n"
    assert load_recipe(recipe(moved)).recipe.compare.judge == "pocket-oracle"


def test_a_scalar_reward_has_no_statistic(recipe):
    text = GOOD + "compare:\n  rewards: [{name: pocket-oracle, statistic: {kind: expectation}}]\n"
    assert "statistic needs a distributional reward" in mistakes_of(recipe(text))


GUARDED = GOOD + "guard: {prompts: prompts.txt, rewards: [{name: pickscore}]}\n"


@pytest.mark.parametrize("section", ["rewards", "guard.rewards", "compare.rewards"])
@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{name: picscore}", r"reward 'picscore' is unknown \(there are aesthetic,.*\); did you mean 'pickscore'?"),
        ("{name: pickscore, options: {modle: x}}", r"key 'modle' unknown in {}\.0\.options; did you mean 'model'?"),
        ("{name: http-judge}", r"key 'url' is missing in {}\.0\.options"),
        ("{name: pickscore, options: {model: ./no}}", r"{}\.0\.options\.model: model '\./no': there is no such folder"),
        ("{name: clipscore, statistic: {kind: expectation}}", "statistic needs a distributional reward"),
        ("{name: absent}", "'absent' needs no_such_module, which is not installed"),
    ],
)
def test_rewards_are_checked_wherever_they_are_listed(recipe, monkeypatch, section, entry, said):
    monkeypatch.setattr(registry.rewards, "_decorated", {})
    card = RewardCard("absent", "", differentiable=True, needs_prompt=False, range=None, requires=("no_such_module",))
    registry.rewards.register("absent", type("Absent", (), {"card": card, "Config": Options, "load": None}))
    assert load_recipe(recipe(GUARDED), files=True)
    text = mistakes_of(recipe(GUARDED), f"{section}=[{entry}]")
    assert re.search(said.format(re.escape(section)).replace("?", r"\?"), text), text
    assert f"override '{section}=" in text


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("picscore", "reward 'picscore' is unknown"),
        ("http-judge", "http-judge:option=value: key 'url' is missing in options"),
        ("pickscore:modle=a/b", "key 'modle' unknown in options; did you mean 'model'?"),
        ("pickscore:model=./no", "compare.judge.options.model: model './no': there is no such folder"),
        ("pickscore:model", "'model' is not option=value"),
    ],
)
def test_the_judge_is_checked_with_its_options(recipe, judge, said):
    text = mistakes_of(recipe(GOOD + f"compare:\n  judge: '{judge}'\n"))
    assert said in text
    assert "recipe.yaml:18: " in text


def test_a_judge_by_name_is_the_reward_that_is_compared(recipe):
    """With its options there: http-judge cannot be without."""
    options = "{url: 'http://localhost:1/v1', served_model: x}"
    rewards = f"compare.rewards=[{{name: http-judge, options: {options}}}]"
    assert load_recipe(recipe(), [rewards, "compare.judge=http-judge"], files=True)
    assert load_recipe(recipe(), ["compare.judge='pickscore:model=some/hub-id'"], files=True)
    # the guard's rewards are not those of compare
    guard = f"guard.rewards=[{{name: http-judge, options: {options}}}]"
    assert "'url' is missing" in mistakes_of(recipe(GUARDED), guard, "compare.judge=http-judge")


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("guard.prompts", "guard.prompts={}"),
        ("compare.prompts", "compare.prompts={}"),
        ("regularise.sft.manifest", "regularise.sft={{manifest: {}, weight: 0.1}}"),
    ],
)
def test_files_are_looked_at_wherever_they_are_named(recipe, tmp_path, key, override):
    said = mistakes_of(recipe(GUARDED), override.format("nowhere.jsonl"))
    assert f"{key}: there is no file 'nowhere.jsonl' (relative paths start at {tmp_path})" in said
    (tmp_path / "rows.jsonl").write_text('{"promt": "a cat", "image": "a.png"}\n')
    said = mistakes_of(recipe(GUARDED), override.format("rows.jsonl"), kind=DataError)
    assert f"{key}: " in said and "rows.jsonl" in said


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(recipe):
    text = GOOD.replace("rank: 8", "rank: x").replace("zreward", "nothing").replace("steps: 10", "stepz: 1")
    said = mistakes_of(recipe(text), "checkpoint.evry=3")
    assert "recipe.yaml and the overrides have 5 mistakes" in said.splitlines()[0]
    assert re.findall(r"recipe\.yaml:(\d+):", said) == ["5", "12", "15", "16"]
    assert said.splitlines()[-1].startswith("override 'checkpoint.evry=3': key 'evry' unknown in checkpoint")


def test_a_flood_of_mistakes_is_cut(recipe):
    said = mistakes_of(recipe(GOOD + "".join(f"key{i}: 1\n" for i in range(500))))
    assert "500 mistakes" in said
    assert len(said.splitlines()) == 32


def test_a_key_of_another_task_is_a_mistake(recipe):
    text = "task: reward_sft\nscorer: {model: a/b}\ndata: {records: r.jsonl}\ntrain: {steps: 1}\nrollout: {}\n"
    assert ":5: key 'rollout' unknown in a recipe of task reward_sft" in mistakes_of(recipe(text), files=False)


def test_faults_of_data_files_are_data_errors(recipe, tmp_path):
    path = recipe()
    (tmp_path / "prompts.txt").write_text("\n \n")
    said = mistakes_of(path, kind=DataError)
    assert "recipe.yaml:7: data.prompts:" in said
    assert "no prompts" in said
    (tmp_path / "prompts.txt").write_text("a\x1b[31mred fox\n")
    assert "prompts.txt" in mistakes_of(path, kind=DataError)


def test_of_a_long_data_file_the_first_rows_are_read(recipe, tmp_path):
    rows = ['{"prompt": "a cat"}'] * 60_000
    rows[2] = '{"promt": "a cat"}'
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    said = mistakes_of(recipe(), "data.prompts=long.jsonl", kind=DataError)
    assert "long.jsonl:3: a row of prompts needs 'prompt'" in said


# --------------------------------------------------------------------------------------------------------- finding one


def test_a_missing_recipe_is_answered_with_the_nearest(recipe, tmp_path):
    recipe()
    assert "did you mean 'recip" in mistakes_of(Path("recipes.yaml"))
    assert "did you mean 'pocket/base-sft'?" in mistakes_of(Path("pocket/base-sfd"))
    assert "is a folder" in mistakes_of(tmp_path)


def test_the_schema_refuses_unknown_keys_and_knows_every_section():
    schema = recipe_schema()
    sections = schema["$defs"]
    assert set(schema["discriminator"]["mapping"]) == set(TASKS)
    assert all(section["additionalProperties"] is False for section in sections.values())
    assert all(section.get("description") for section in sections.values())


# ----------------------------------------------------------------------------------------------------- local pipelines


def local_pipeline(folder: Path, class_name: str) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    return folder


def test_a_local_pipelines_family_is_recognised_and_its_options_checked(recipe, tmp_path):
    local_pipeline(tmp_path / "known", "ZImagePipeline")
    assert load_recipe(recipe(), ["pipeline.model=./known"], files=True)
    said = mistakes_of(recipe(), "pipeline.model=./known", "pipeline.options={max_length: 3}")
    assert "key 'max_length' unknown in pipeline.options; did you mean 'max_sequence_length'?" in said


def test_a_local_pipeline_of_no_family_is_refused(recipe, tmp_path):
    local_pipeline(tmp_path / "strange", "KolorsPipeline")
    said = mistakes_of(recipe(), "pipeline.model=./strange")
    assert "is a KolorsPipeline, which no family recognises" in said
    assert "z_image" in said and "write pipeline.family: generic" in said
    (tmp_path / "strange" / "model_index.json").write_text("{")
    assert "cannot be read" in mistakes_of(recipe(), "pipeline.model=./strange")


def test_somebody_elses_broken_family_stops_nobody(recipe, tmp_path, monkeypatch):
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rewardtune.pipelines]\na_broken = broken_family:Family\n")
    (tmp_path / "site" / "broken_family.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    local_pipeline(tmp_path / "known", "ZImagePipeline")
    assert load_recipe(recipe(), ["pipeline.model=./known"], files=True)
    local_pipeline(tmp_path / "strange", "KolorsPipeline")
    assert "which no family recognises" in mistakes_of(recipe(), "pipeline.model=./strange")


# -------------------------------------------------------------------------------------------------------------- fuzzing


WORDS = [
    "task",
    "sft",
    "direct_reward",
    "reward_sft",
    "name",
    "zreward",
    "options",
    "model",
    "steps",
    "rewards",
    "kind",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(WORDS), SCALARS), inner, max_size=3)
    ),
    max_leaves=8,
)
SECTIONS = st.sampled_from(
    [
        "task",
        "pipeline",
        "lora",
        "full",
        "data",
        "rollout",
        "gradient",
        "rewards",
        "train",
        "compare",
        "samples",
        "guard",
        "regularise",
        "scorer",
    ]
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(SECTIONS, VALUES, min_size=1, max_size=3), override=st.text(max_size=12))
def test_whatever_a_recipe_holds_the_answer_is_a_recipe_or_a_sentence(tmp_path_factory, changes, override):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(GOOD), **changes}, allow_unicode=True), encoding="utf-8")
    for overrides in ((), [override], [f"rewards.0.{override}=1"]):
        try:
            load_recipe(path, overrides, files=True)
        except (RecipeError, DataError) as error:
            assert str(error)
