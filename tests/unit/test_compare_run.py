"""`compare` from sides to page on a real, tiny, untrained Z-Image pipeline, and diffusers alone drawing it again."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from rewardtune import registry
from rewardtune.cli.app import app
from rewardtune.compare.run import compare
from rewardtune.compare.sampling import image_seed
from rewardtune.compare.scores import choose_rewards, require_rewards, tie_bands
from rewardtune.compare.sides import reference_side, resolve_sides
from rewardtune.diffusion import rollout
from rewardtune.errors import CheckFailed, DataError, DiskError, RecipeError, RewardTuneError
from rewardtune.plugins import Options, RewardCard
from rewardtune.recipe.rewards import RewardSection
from rewardtune.training.run_folder import lock
from rewardtune.types import Score


class Red:
    """Mean red."""

    card = RewardCard(name="run-red", summary="", differentiable=True, needs_prompt=False, range=(0.0, 1.0))
    Config = Options
    TIE_BAND = 0.0

    @classmethod
    def load(cls, config: Options, *, device: str) -> Self:
        return cls()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        return Score(images[:, 0].mean(dim=(1, 2)))


class Bright(Red):
    """Mean brightness, no tie band of its own."""

    card = RewardCard(
        name="run-bright", summary="", differentiable=True, needs_prompt=False, range=(0.0, 4.0), held_out=True
    )
    TIE_BAND = None  # type: ignore[assignment]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        return Score(images.mean(dim=(1, 2, 3)) * 4)


class Green(Red):
    """Mean green, with an option."""

    card = RewardCard(name="run-green", summary="", differentiable=True, needs_prompt=False, range=(0.0, 1.0))

    class Config(Options):  # type: ignore[no-redef]
        weight: float = 1.0


for _reward in (Red, Bright, Green):
    registry.rewards.register(_reward.card.name, _reward)

PROMPTS = ["a dog", "two cats on a red background", "a bee above a bus"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder, a run folder with a LoRA of random weights, and prompts."""
    root = tmp_path_factory.mktemp("world")
    pipe = tiny_pipeline()
    pipe.save_pretrained(root / "pipeline")
    run = root / "runs" / "demo"
    (run / "export").mkdir(parents=True)
    save_lora(pipe, run / "export")
    recipe = {
        "task": "direct_reward",
        "pipeline": {"model": str(root / "pipeline"), "options": {"max_sequence_length": 32}},
        "lora": {"rank": 2},
        "data": {"prompts": "unused.txt"},
        "gradient": {"method": "draft"},
        "rewards": [{"name": "run-red"}],
        "train": {"steps": 1, "device": "cpu"},
        "compare": {
            "prompts": str(root / "prompts.txt"), "judge": "run-bright", "steps": 2, "guidance_scale": 2.0,
            "batch_size": 4, "seeds": 2,
        },
    }  # fmt: skip
    (run / "recipe.json").write_text(json.dumps({"recipe": recipe}))
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


def tiny_pipeline() -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "<end>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <end>{% endfor %}"
    text = Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 4, 4], axes_lens=[128, 32, 32],
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=Qwen3Model(text), tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip


def save_lora(pipe: Any, folder: Path, *, scale: float = 0.3) -> None:
    """Random adapters in diffusers' keys; the pipeline is left without them."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"]))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=scale)
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.transformer.delete_adapters("default")


@pytest.fixture(scope="module")
def report(world: Path) -> Any:
    return compare(["base", world / "runs" / "demo"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_everything_is_where_the_contract_says(world: Path, report: Any) -> None:
    folder = world / "runs" / "demo" / "compare"
    assert report.folder == folder
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [".lock", "compare.json", "images", "report.html", "reproduce.py", "samples.csv", "scores.json"]
    )
    document = json.loads((folder / "compare.json").read_text())
    assert document == report.document
    assert document["sides"] == ["base", "demo"] and document["reference"] == "base"
    assert (document["prompts"], document["seeds"]) == (3, 2)
    assert document["pairs"][0]["judge"] == "run-bright" and document["judge"]["held_out"]
    assert document["judge"]["tie_band"] == pytest.approx(0.08), "0.02 of the range 0 to 4"
    assert document["side_details"]["demo"]["trained_on"] == ["run-red"]
    assert set(document["rewards"]["demo"]) == {"run-bright", "run-red"}, "trained rewards are always scored"
    assert document["reward_cards"]["run-red"]["trained"] and not document["reward_cards"]["run-bright"]["trained"]
    with (folder / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        red = pixels(folder / row["image"])[..., 0].mean() / 255
        assert float(row["run-red"]) == pytest.approx(red, abs=1e-6), "scores are those of the files"


def test_sides_share_noise_and_differ_by_the_lora(report: Any) -> None:
    seeds = {(p, k): image_seed(p, k) for p in range(3) for k in range(2)}
    assert len(set(seeds.values())) == 6 and max(seeds.values()) < 2**32
    records = {s: json.loads((report.folder / "images" / s / "sampling.json").read_text()) for s in ("base", "demo")}
    assert records["base"]["images"] == records["demo"]["images"]
    assert [image["seed"] for image in records["base"]["images"]] == list(seeds.values())
    images = report.folder / "images"
    for image in records["base"]["images"]:
        assert not np.array_equal(pixels(images / "base" / image["file"]), pixels(images / "demo" / image["file"]))


def test_the_order_of_sides_changes_no_image(world: Path, report: Any, tmp_path: Path) -> None:
    turned = compare([world / "runs" / "demo", "base"], out=tmp_path)
    assert turned.document["reference"] == "base" and turned.document["pairs"] == report.document["pairs"]
    for file in report.folder.glob("images/*/*.png"):
        assert (tmp_path / file.relative_to(report.folder)).read_bytes() == file.read_bytes(), file


def test_a_plain_diffusers_script_draws_the_very_images(report: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(report.folder / "reproduce.py")], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "base: 6 of 6 images equal, largest difference 0" in done.stdout
    assert "demo: 6 of 6 images equal, largest difference 0" in done.stdout
    code = (report.folder / "reproduce.py").read_text().partition('"""\n\nfrom')[2]
    assert "rewardtune" not in code


def test_images_are_used_again_and_redrawn_only_where_needed(world: Path, report: Any) -> None:
    folder = report.folder / "images" / "demo"
    before = {file: file.stat().st_mtime_ns for file in sorted(folder.glob("*.png"))}
    first = next(iter(before))
    original = first.read_bytes()
    Image.new("RGB", (16, 16)).save(first)
    again = compare(["base", world / "runs" / "demo"])
    assert first.read_bytes() == original, "an image that was changed is drawn again"
    untouched = [file for file, time in before.items() if file.stat().st_mtime_ns == time]
    assert len(untouched) == 2, "the other batch of four is kept"
    assert again.document == report.document


def test_other_settings_draw_everything_again(world: Path, tmp_path: Path) -> None:
    sides = ["base", str(world / "runs" / "demo")]
    small = compare(sides, out=tmp_path, seeds=1, num_prompts=2, judge="run-red", rewards="run-bright")
    assert (small.document["prompts"], small.document["seeds"]) == (2, 1)
    assert len(list((tmp_path / "images" / "demo").glob("*.png"))) == 2
    assert not small.document["judge"]["held_out"]
    larger = compare(sides, out=tmp_path, seeds=2, num_prompts=2, judge="run-red")
    assert len(list((tmp_path / "images" / "demo").glob("*.png"))) == 4
    assert larger.document["report"] != small.document["report"]


def test_votes_merge_into_the_finished_report(world: Path, report: Any, tmp_path: Path) -> None:
    votes = {
        "kind": "rewardtune-votes", "version": 1, "report": report.document["report"], "rater": "a", "session": "1",
        "saved": "now",
        "votes": [{"prompt": p, "seed": 0, "left": "demo", "right": "base", "choice": "left"} for p in range(3)],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(votes))
    (tmp_path / "b.json").write_text(json.dumps({**votes, "session": "2"}))
    # as a shell expands `--votes *.json`: one option and one more argument
    merged = compare([str(tmp_path / "b.json")], votes=[tmp_path / "a.json"], out=report.folder)
    human = merged.document["pairs"][-1]
    assert (human["judge"], human["wins"], human["net"]) == ("human", 6, 1.0)
    assert "People: 6 votes by 2 raters" in merged.page.read_text()
    assert merged.document["pairs"][0] == report.document["pairs"][0]
    with pytest.raises(DataError, match="no finished comparison"):
        compare(votes=[tmp_path / "a.json"], out=tmp_path)
    with pytest.raises(RecipeError, match="needs sides"):
        compare(votes=[tmp_path / "a.json"])


def test_fail_under_prints_the_document_and_then_leaves_with_1(world: Path, report: Any) -> None:
    net = report.document["pairs"][0]["net"]
    words = ["compare", "base", str(world / "runs" / "demo"), "--json", "--fail-under"]
    failed = CliRunner().invoke(app, [*words, str(net + 0.01)])
    assert failed.exit_code == 1 and "below --fail-under" in failed.stderr
    assert json.loads(failed.stdout)["pairs"][0]["net"] == net
    assert CliRunner().invoke(app, [*words, str(net)]).exit_code == 0
    with pytest.raises(CheckFailed, match="below --fail-under"):
        report.require(net + 0.01)


def test_warnings_stand_beside_the_headline_in_the_terminal(world: Path, report: Any) -> None:
    few = "Only 3 different prompts: intervals are wide. Use 50 or more."
    assert few in report.warnings
    words = ["compare", "base", str(world / "runs" / "demo")]
    said = CliRunner().invoke(app, words)
    warned = [f"warning: {warning}" for warning in report.warnings]
    assert said.stdout.splitlines() == [report.headline, *warned, str(report.page)]
    assert "warning:" not in said.stderr
    as_json = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(as_json.stdout) == report.document, "nothing beside the document"
    assert [line for line in as_json.stderr.splitlines() if line.startswith("warning:")] == warned


def test_sides_are_recognised(world: Path, tmp_path: Path) -> None:
    run = world / "runs" / "demo"
    lora = tmp_path / "my lora"
    lora.mkdir()
    file = "pytorch_lora_weights.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(run / "export" / file)
    recipe = json.dumps(json.loads((run / "recipe.json").read_text())["recipe"])
    save_file(tensors, lora / file, metadata={"rewardtune.base": "pocket:pipeline", "rewardtune.recipe": recipe})
    base, demo, export, plain, bare = resolve_sides(["base", run, run / "export", world / "pipeline", lora])
    assert [s.name for s in (base, demo, export, plain, bare)] == ["base", "demo", "demo-2", "pipeline", "my-lora"]
    assert base.lora is None and base.pipeline == demo.pipeline and base.known
    assert demo.lora == run / "export" == export.lora
    assert plain.pipeline.options == {"max_sequence_length": 32}, "the run's options, so that nothing else differs"
    assert not plain.known
    assert bare.lora == lora and [r.name for r in bare.trained_on] == ["run-red"]
    assert reference_side([demo, base]) is base and reference_side([demo, plain]) is demo
    save_file(tensors, lora / file, metadata={"rewardtune.base": "pocket:pipeline"})
    found = resolve_sides([lora, run])[0].pipeline
    assert (found.model, found.revision) == ("pocket:pipeline", None)
    save_file(tensors, lora / file, metadata={"rewardtune.base": "team/model", "rewardtune.base_revision": "v2"})
    found = resolve_sides([lora, run])[0].pipeline
    assert (found.model, found.revision) == ("team/model", "v2")


def test_sides_of_one_name_are_told_apart_by_what_differs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(*sides: str) -> list[str]:
        for side in sides:
            folder = tmp_path / side.partition("@")[0]
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.exists() and side != "base":
                folder.symlink_to(world / "runs" / "demo")
        return [side.name for side in resolve_sides(sides)]

    monkeypatch.chdir(tmp_path)
    assert names("base", "a/run", "b/run", "b/run@0.5") == ["base", "a-run", "b-run", "b-run-0.5"]
    assert names("b/run", "a/run", "other") == ["b-run", "a-run", "other"], "whatever the order"
    assert names("lr 1/s0/run", "lr 1/s1/run") == ["s0-run", "s1-run"], "no more than is needed"
    assert names("lr 1/s0/run", "lr 2/s0/run") == ["lr-1-s0-run", "lr-2-s0-run"]
    assert names("a/run@1.0", "b/run@0") == ["a-run-1", "b-run-0"]
    assert names("base", "c/base") == ["base", "c-base"]
    assert names("a/run", "a/run/export") == ["run", "run-2"], "nothing else differs"
    sweep = "sweep-with-rank=16,seed={},guidance=4.5,steps=20,batch=8,and-so-on"
    first, second, short = names(f"{sweep.format(3)}@0.5", sweep.format(4), "run")
    assert first == "sweep-with-ra..k-16-seed-3-guidance-4.5-0.5" and short == "run"
    assert second == "sweep-with-ra..k-16-seed-4-guidance-4.5" and len(second) <= 40
    assert names(sweep.format(3), "run")[0] == "sweep-with-ra..teps-20-batch-8-and-so-on"


def test_sides_that_cannot_be_compared(world: Path, tmp_path: Path) -> None:
    run = world / "runs" / "demo"
    scorer = {"task": "reward_sft", "scorer": {"model": "x/y"}, "data": {"records": "r"}, "train": {"steps": 1}}
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer" / "recipe.json").write_text(json.dumps({"recipe": scorer}))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for sides, message in (
        ([run], "at least two"),
        ([run, run], "named twice"),
        (["base", world / "pipeline"], "no side is a run folder"),
        (["base", tmp_path / "scorer"], "draws no images"),
        (["base", tmp_path / "unfinished"], "no finished export"),
        (["base", tmp_path / "broken"], "not the recipe of a run"),
        ([run, tmp_path / "empty"], "neither a run folder"),
        ([run, tmp_path / "nowhere"], "nowhere"),
        ([run, "pocket:nothing"], "does not ship"),
    ):
        with pytest.raises(RecipeError, match=message):
            resolve_sides(sides)


def test_a_side_that_is_not_there_is_told_alike_however_it_is_written(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world / "runs")
    for side, where in (
        ("dmo", world / "runs"), ("./dmo", world / "runs"), ("../runs/dmo", "../runs"), (str(world / "runs/dmo"), ""),
        ("a/b/c", "a/b"),
    ):  # fmt: skip
        guess = "." if side == "a/b/c" else "; did you mean 'demo'?"
        with pytest.raises(RecipeError) as told:
            resolve_sides(["base", side])
        assert str(told.value).startswith(f"{side}: there is no such folder in {where or world / 'runs'}{guess} Give")


def test_a_pipeline_that_will_not_load_costs_no_image(world: Path, tmp_path: Path) -> None:
    run = world / "runs" / "demo"
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model_index.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "Other"}')
    (moved := tmp_path / "moved" / "recipe.json").parent.mkdir()
    moved.write_text((run / "recipe.json").read_text().replace(str(world / "pipeline"), "/nowhere/at/all"))
    (moved.parent / "export").symlink_to(run / "export")
    for side, message in (
        ("torn", "torn: .*cannot be read"), ("other", "other is a Other"), ("moved", "moved: .*/nowhere/at/all.* no"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            resolve_sides([run, tmp_path / side])
    with pytest.raises(RecipeError, match="--device 'cqu' is no device"):
        compare(["base", run], device="cqu", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistyped_run_is_no_hub_id(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    with pytest.raises(RecipeError, match="runs/dmo: there is no such folder in runs; did you mean 'demo'"):
        resolve_sides(["runs/demo", "runs/dmo"])
    with pytest.raises(RecipeError, match=r"no side is a run folder.*: owner/name\. Check"):
        resolve_sides(["base", "owner/name"])


def test_mistakes_cost_no_image(world: Path, tmp_path: Path) -> None:
    sides = ["base", world / "runs" / "demo"]
    out = tmp_path / "out"
    twin = tmp_path / "twin"
    twin.symlink_to(world / "pipeline")
    with pytest.raises(ImportError, match="run-bright"):
        compare(sides, out=out, judge="run-brigth")
    with pytest.raises(RecipeError, match="--seeds 0"):
        compare(sides, out=out, seeds=0)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        compare(sides, out=out, prompts=tmp_path / "empty.txt")
    with pytest.raises(RecipeError, match="--fail-under needs a judge"):
        compare([world / "pipeline", twin], out=out, prompts=world / "prompts.txt", needs_verdict=True)
    assert not out.exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match="cannot be written"):
        compare(sides, out=tmp_path / "file")


def test_a_second_comparison_in_the_folder_is_refused_and_told_by_whom(world: Path, tmp_path: Path) -> None:
    sides = ["base", world / "runs" / "demo"]
    descriptor = lock(tmp_path, "rewardtune compare")
    said = rf"in use by `rewardtune compare` \(process {os.getpid()} on .*Wait until .* --out"
    with pytest.raises(RecipeError, match=said):
        compare(sides, out=tmp_path)
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(RecipeError, match=said):
        compare(out=tmp_path, votes=["a.json"])
    assert not (tmp_path / "images").exists()
    os.close(descriptor)
    assert compare(sides, out=tmp_path, num_prompts=1, seeds=1).page.exists(), "the lock goes with its holder"
    os.close(lock(tmp_path))


def test_a_judge_that_cannot_be_loaded_costs_no_image(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, constants

    def judged_by(judge: str) -> Any:
        return compare(["base", world / "runs" / "demo"], out=tmp_path / "out", judge=judge)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match=r"'hpsv3': the weights of checkpoint 'MizzenAI/HPSv3' are not.*OFFLINE is"):
        judged_by("hpsv3")
    with pytest.raises(RecipeError, match=r"reward 'zreward': .*no such folder"):
        judged_by("zreward:checkpoint=./nowhere")
    monkeypatch.setenv("REWARDTUNE_TOKEN", "a" * 64)
    with pytest.raises(RewardTuneError, match=r"http://127\.0\.0\.1:9"):
        judged_by("remote:url=http://127.0.0.1:9,retries=0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)

    def unreachable(*given: Any, **named: Any) -> None:
        raise ConnectionError("no route to it")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(RecipeError, match=r"tokenizer 'bert-base/x' .* cannot be fetched from the hub: no route"):
        judged_by(f"imagereward:checkpoint={world / 'prompts.txt'},tokenizer=bert-base/x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("side", "told"),
    [
        ("owner/not-fetched", r"^owner/not-fetched: .*cannot be fetched from the hub: HF_HUB_OFFLINE is set"),
        ("no:hub/name", r"^no:hub/name: .*the hub can have no such name"),
        ("compare.prompts=pocket:prompts/validation", r"takes no overrides.*--prompts"),
    ],
)
def test_a_side_that_cannot_be_loaded_costs_no_image(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, told: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match=told):
        compare(["base", world / "runs" / "demo", side], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_here_or_at_the_hub_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **named: asked.append((name, named["revision"])))

    def look(name: str, **options: Any) -> None:
        require_rewards(choose_rewards([RewardSection(name=name, options=options)], [], None), device="cpu")

    models = dict(registry.rewards.card("hpsv3").models)
    look("hpsv3")
    assert asked == list(models.items()), "what the cache lacks is asked for, with its commit"
    for model, commit in models.items():
        snapshot = tmp_path / f"models--{model.replace('/', '--')}" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "a file").touch()
    look("hpsv3")
    look("hpsv3", checkpoint=str(tmp_path))
    look("zreward")
    look("run-red")
    assert len(asked) == 2
    look("hpsv3", checkpoint="owner/name", revision="v2")
    assert asked[2:] == [("owner/name", "v2")]
    (branch := tmp_path / "models--owner--name" / "refs" / "v2").parent.mkdir(parents=True)
    branch.write_text("a" * 40)
    (branch.parents[1] / "snapshots" / ("a" * 40) / "model").mkdir(parents=True)
    look("hpsv3", checkpoint="owner/name", revision="v2")
    assert len(asked) == 3, "a branch leads to its commit"


def test_an_interruption_keeps_what_was_drawn(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["compare", "base", str(world / "runs" / "demo"), "--out", str(tmp_path / "out")]
    told = f"interrupted. The images drawn so far are kept in {tmp_path / 'out' / 'images'}, and the same command goes"

    def interrupted() -> None:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 130 and "Traceback" not in result.output
        said = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert said == [f"error: {told} on from there."]

    def drawn() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("images/*/*.png"))}

    draw = rollout.sample
    batches = iter([draw, draw, draw])

    def sample(*given: Any, **named: Any) -> Tensor:
        for one in batches:
            return one(*given, **named)
        raise KeyboardInterrupt

    def score(*given: Any) -> Score:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rollout, "sample", sample)
        interrupted()
    before = drawn()
    assert len(before) == 10, "of 12 images in batches of 4 and 2, without the last batch"
    with monkeypatch.context() as patched:
        patched.setattr(Bright, "score", score)
        interrupted()
    assert len(drawn()) == 12 and before.items() <= drawn().items()
    before = drawn()
    assert CliRunner().invoke(app, words).exit_code == 0 and drawn() == before


def test_choice_of_rewards_and_judge() -> None:
    red, bright = RewardSection(name="run-red"), RewardSection(name="run-bright")
    assert choose_rewards([red, bright], [], None).judge == "run-bright", "held out by its card"
    assert choose_rewards([red], [], None).judge == "run-red"
    alone = choose_rewards([red], [red], None)
    assert (dict(alone.rewards), alone.trained, alone.judge) == ({"run-red": red}, {"run-red"}, None)
    assert choose_rewards([bright], [red], "run-red").judge == "run-red", "a trained reward judges only if named"
    panel = choose_rewards([red], [], "run-bright")
    assert list(panel.rewards) == ["run-red", "run-bright"] and panel.judge == "run-bright"


def test_a_reward_is_scored_once_however_its_options_are_written() -> None:
    plain = RewardSection(name="run-green")
    spelled = RewardSection(name="run-green", options={"weight": 1.0})
    other = RewardSection(name="run-green", options={"weight": 2.0})
    panel = choose_rewards([plain, other], [spelled], None)
    assert list(panel.rewards) == ["run-green", "run-green:weight=2.0"]
    assert panel.trained == {"run-green"}, "the other settings were not trained on"
    assert panel.judge is None, "yet it is too close to judge unasked"
    with pytest.raises(RecipeError, match="wieght"):
        choose_rewards([RewardSection(name="run-green", options={"wieght": 1})], [], None)


def test_tie_bands() -> None:
    assert tie_bands(Red()) == (0.0, {})
    assert tie_bands(Bright())[0] == pytest.approx(0.08)
