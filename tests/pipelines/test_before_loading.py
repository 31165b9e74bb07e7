"""What is told of a checkpoint before a weight of it is loaded: sizes that its family would refuse or round, and
pipelines that are not from text to one image."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import parity
import pytest
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from rewardtune.pipelines.generic import Generic

import rewardtune
from rewardtune import registry
from rewardtune.build import build_task, find_family, load_pipeline
from rewardtune.diffusion import families, pipeline_source
from rewardtune.errors import RecipeError
from rewardtune.recipe.file import load_recipe
from rewardtune.recipe.sections import PipelineSection

FAMILIES = parity.families()
RECIPE = """
task: direct_reward
pipeline: {model: %s}
lora: {}
data: {prompts: "pocket:prompts/train"}
gradient: {method: draft}
rewards: [{name: zreward}]
train: {steps: 1, device: cpu}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(model: str) -> Path:
        (tmp_path / "recipe.yaml").write_text(RECIPE % model)
        return tmp_path / "recipe.yaml"

    return write


def said(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, files=True)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- sizes


def without_weights(pipe, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    weights = list(folder.rglob("*.safetensors"))
    assert weights
    for file in weights:
        file.unlink()
    return folder


def other_parts(pipe):
    """The same pipeline, told that its autoencoder shrinks the sides further and that its patches are larger."""
    vae, denoiser = pipe.vae, getattr(pipe, "transformer", None) or pipe.unet
    for name in ("block_out_channels", "encoder_block_out_channels", "temperal_downsample"):
        if name in vae.config:
            longer = (*vae.config[name], *vae.config[name])
            vae.register_to_config(**{name: longer})
            if name in vars(vae):  # Qwen-Image's pipeline asks the model itself
                setattr(vae, name, longer)
    if isinstance(denoiser.config.get("patch_size"), int):
        denoiser.register_to_config(patch_size=denoiser.config.patch_size * 3)
    return type(pipe).from_pipe(pipe)


@pytest.mark.parametrize("change", [lambda pipe: pipe, other_parts], ids=["as published", "other parts"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoints_files_tell_what_the_loaded_pipeline_will_say(name, change, tmp_path):
    adapter = FAMILIES[name].adapter
    pipe = change(FAMILIES[name].make())
    folder = without_weights(pipe, tmp_path)
    assert families.size_multiple(adapter, folder) == adapter(pipe).size_multiple > 1


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux", "sana", "qwen_image"])
def test_validate_and_train_refuse_a_size_without_the_weights(name, recipe, tmp_path):
    pipe = FAMILIES[name].make()
    family, multiple = FAMILIES[name].adapter.family, FAMILIES[name].adapter(pipe).size_multiple
    without_weights(pipe, tmp_path / "base")
    path, wrong = recipe("./base"), 3 * multiple + 1
    told = said(path, f"rollout={{height: {wrong}, width: {2 * multiple}}}")
    assert f"rollout.height: {wrong} pixels do not fit the family '{family}'" in told
    assert f"multiples of {multiple} high and wide" in told
    assert f"The nearest are {3 * multiple} and {4 * multiple}." in told
    assert "rollout.width" not in told
    # the way that train goes; with the weights gone, whatever loaded them would fail in other words
    with pytest.raises(RecipeError, match=rf"rollout\.width: {wrong} pixels do not fit"):
        rewardtune.train(str(path), overrides={"rollout.width": wrong}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert load_recipe(path, [f"rollout={{height: {3 * multiple}, width: {2 * multiple}}}"], files=True)


def test_the_pocket_pipelines_sizes(recipe):
    told = said(recipe("pocket:pipeline"), "rollout={height: 50, width: 4}")
    assert "rollout.height: 50 pixels do not fit the family 'z_image'" in told and "are 48 and 56." in told
    assert "rollout.width: 4 pixels do not fit" in told and "The smallest is 8." in told
    assert load_recipe(recipe("pocket:pipeline"), ["rollout={height: 48}"], files=True)


def test_a_family_that_is_named_by_hand_has_sizes_too(recipe, tmp_path):
    without_weights(FAMILIES["stable_diffusion"].make(), tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    told = said(recipe("./base"), "pipeline.family=stable_diffusion", "rollout.height=17")
    assert "rollout.height: 17 pixels do not fit the family 'stable_diffusion'" in told


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"block_out_channels": 3}'])
def test_a_size_is_left_to_the_loaded_pipeline_where_the_files_do_not_tell(config, recipe, tmp_path):
    without_weights(FAMILIES["flux"].make(), tmp_path / "base")
    file = tmp_path / "base" / "vae" / "config.json"
    file.unlink() if config is None else file.write_text(config)
    assert load_recipe(recipe("./base"), ["rollout.height=17"], files=True)


def test_the_loaded_pipeline_refuses_a_size_before_a_reward_is_loaded(recipe, tmp_path):
    """As with a hub id, of which nothing is known before: here nobody has checked the files."""
    FAMILIES["stable_diffusion"].make().save_pretrained(tmp_path / "base")
    reward = "rewards=[{name: zreward, options: {checkpoint: ./nowhere}}]"
    with pytest.raises(RecipeError, match=r"rollout\.width: 17 pixels do not fit the family 'stable_diffusion'"):
        build_task(load_recipe(recipe("./base"), [reward, "rollout.width=17"]).recipe, device="cpu")
    with pytest.raises(RecipeError, match=r"\./nowhere"):
        build_task(load_recipe(recipe("./base"), [reward, "rollout.width=16"]).recipe, device="cpu")


def test_of_a_hub_id_the_cache_is_asked_and_no_network(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path = recipe("somebody/flux")
    assert load_recipe(path, ["rollout.height=17"], files=True)
    base, commit = tmp_path / "hub" / "models--somebody--flux", "1a" * 20
    without_weights(FAMILIES["flux"].make(), base / "snapshots" / commit)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)
    assert "rollout.height: 17 pixels do not fit the family 'flux'" in said(path, "rollout.height=17")
    assert "do not fit" in said(path, "rollout.height=17", f"pipeline.revision='{commit}'")
    assert load_recipe(path, ["rollout.height=17", "pipeline.revision=v2"], files=True)
    shutil.rmtree(base / "snapshots" / commit / "vae")
    assert load_recipe(path, ["rollout.height=17"], files=True)


# -------------------------------------------------------------------------------------------------------------- kinds


def folder_of(name: object, folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.1"}))
    return folder


OTHER_KINDS = {
    "WanPipeline": "makes videos",
    "LTXPipeline": "makes videos",
    "HunyuanVideoPipeline": "makes videos",
    "StableDiffusionInpaintPipeline": "starts from a picture",
    "FluxFillPipeline": "starts from a picture",
    "StableDiffusionXLImg2ImgPipeline": "starts from a picture",
    "FluxControlNetPipeline": "starts from a picture",
    "QwenImageEditPipeline": "takes pictures",
    "StableAudioPipeline": "a call without height, width",
    "WuerstchenCombinedPipeline": "no transformer or unet with a scheduler",
    "NobodysPipeline": "is not among the pipelines of diffusers",
}
WHOLE = ["pipeline.family=generic", "rollout.guidance=full"]


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_what_is_not_from_text_to_one_image_is_refused_by_its_class(name, recipe, tmp_path):
    folder_of(name, tmp_path / "base")
    for told in (said(recipe("./base")), said(recipe("./base"), *WHOLE)):
        assert f"pipeline.family generic: {name} " in told and OTHER_KINDS[name] in told
    assert f"./base is a {name}, which no family recognises" in said(recipe("./base"))
    assert "write pipeline.family" not in said(recipe("./base"))
    # and so it is in a recipe that nobody checked, or whose hub id was not known before
    for family in (None, "generic"):
        with pytest.raises(RecipeError, match=f"generic: {name} .*{OTHER_KINDS[name]}"):
            load_pipeline(PipelineSection(model="./base", family=family), device="cpu")


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "KolorsPipeline", "CogView4Pipeline", "FluxKontextPipeline"])
def test_what_can_be_run_as_a_whole_is_told_so(name, recipe, tmp_path):
    folder_of(name, tmp_path / "base")
    assert "write pipeline.family: generic." in said(recipe("./base"))
    assert load_recipe(recipe("./base"), WHOLE, files=True)
    with pytest.raises(RecipeError, match=r"write pipeline\.family: generic\."):
        find_family("./base", None)


@pytest.mark.parametrize("name", [["pipeline", "Mine"], None, 3])
def test_of_somebodys_own_class_nothing_is_known(name, recipe, tmp_path):
    folder_of(name, tmp_path / "base")
    assert load_recipe(recipe("./base"), WHOLE, files=True)


def test_the_class_is_judged_without_torch(recipe, tmp_path):
    folder_of("WanPipeline", tmp_path / "base")
    program = (
        "import sys\nfrom rewardtune.cli.app import app\n"
        f"try:\n    app(['validate', {str(recipe('./base'))!r}])\nexcept SystemExit as left:\n"
        "    assert left.code == 2, left.code\n"
        "assert not [name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules]\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
    assert "WanPipeline makes videos (its call takes num_frames)" in done.stderr


def test_the_source_of_diffusers_is_read_right():
    """Every pipeline class there is: what its source says is what the class says once it is imported."""
    seen = 0
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or name not in pipeline_source.classes():
            continue
        found = getattr(diffusers, name)
        # a stand-in for a class that needs a library which is not here has no parameters of its own
        if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
            continue
        for method in ("__call__", "__init__"):
            parameters = inspect.signature(inspect.unwrap(getattr(found, method))).parameters.values()
            real = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            assert pipeline_source.parameters(name, method) == real - {"self"}, f"{name}.{method}"
        seen += 1
    assert seen > 200
    listed = {found.__name__ for found in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    assert listed <= pipeline_source.text_to_image()
    assert not {"WanPipeline", "FluxFillPipeline", "OmniGenPipeline"} & pipeline_source.text_to_image()


def test_without_a_source_to_read_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(pipeline_source, "classes", dict)
    assert Generic.refuses({"_class_name": "WanPipeline"}) is None


def test_a_family_of_somebody_else_may_tell_neither(recipe, tmp_path, monkeypatch):
    """A plug-in of the contract as it was: no size is known before, and nothing is refused."""

    class Foreign:
        family = "foreign"
        Config = Generic.Config

        @classmethod
        def matches(cls, model_index):
            return model_index.get("_class_name") == "ForeignPipeline"

        @classmethod
        def load(cls, path, config, *, revision, dtype, device):
            raise NotImplementedError

    monkeypatch.setattr(registry.pipelines, "_decorated", {})
    registry.pipelines.register("foreign", Foreign)
    folder_of("ForeignPipeline", tmp_path / "base")
    for overrides in ([], ["pipeline.family=foreign"]):
        assert load_recipe(recipe("./base"), [*overrides, "rollout.height=17"], files=True)
