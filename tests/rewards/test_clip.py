"""The CLIP family beside transformers' processor, the authors' code (stored figures) and damaged files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from backends import hpsv2 as hps
from rewardtune.rewards.aesthetic import make_head
from rewardtune.rewards.hpsv2 import clip_model

from rewardtune.backbones.clip import Clip, QuickGelu
from rewardtune.backbones.pixels import longer_side
from rewardtune.backbones.weights import download, fill
from rewardtune.data.images import to_pil
from rewardtune.errors import RecipeError
from rewardtune.scoring.checks import detailed_image
from rewardtune.scoring.reward_set import load_reward

PROMPTS = ["a red fox", "", "🦊🌈", "ثعلب أحمر", "long " * 200]
HEADS = json.loads((Path(__file__).parent / "reference/aesthetic.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    tiny_clip.save(path)
    return path


@pytest.fixture
def clip() -> Clip:
    return Clip(tiny_clip.model(), tiny_clip.tokenizer())


def test_features_are_those_of_transformers_forward(clip):
    """Its batch is padded to the longest and has a mask; ours are padded each to its own length."""
    words = clip.tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    images = torch.rand(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    out = clip.model(**words, pixel_values=clip.pixels(images))
    assert torch.allclose(clip.image_features(images), out.image_embeds, atol=1e-6)
    assert torch.allclose(clip.text_features(PROMPTS), out.text_embeds, atol=1e-6)
    assert torch.allclose(clip.similarity(images, PROMPTS), (out.image_embeds * out.text_embeds).sum(-1), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 50, 1000), (3, 7, 65539)])
def test_the_activation_is_transformers_own_to_the_bit(shape):
    from transformers.activations import QuickGELUActivation

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    for given in (x, x.bfloat16(), x.transpose(0, 2)):
        with torch.no_grad():
            assert torch.equal(QuickGelu()(given.clone()), QuickGELUActivation()(given))
        assert torch.equal(QuickGelu()(given.clone().requires_grad_(True)), QuickGELUActivation()(given))


def test_text_features_that_were_kept_are_bit_equal_and_run_the_tower_once(clip):
    together = clip.text_features(PROMPTS)
    fresh = Clip(clip.model, clip.tokenizer)
    assert torch.equal(torch.cat([fresh.text_features([prompt]) for prompt in reversed(PROMPTS)]), together.flip(0))
    calls = []
    clip.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(clip.text_features(PROMPTS), together)
    assert not calls
    assert not together.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_text_features_do_not_depend_on_neighbours_nor_on_the_row(dtype, threads):
    """At the width of ViT-L/14's text tower, where the products are split into tiles and among threads."""
    model = tiny_clip.text_tower(width=768, heads=12).to(getattr(torch, dtype))
    drawn = np.random.RandomState(0)
    words = ["".join(chr(97 + c) for c in drawn.randint(0, 26, n)) for n in (1, 3, 8, 12, 22, 23, 30, 46, 60, 90)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = {word: Clip(model, tiny_clip.tokenizer()).text_features([word])[0] for word in words}
        for _ in range(4):
            mixed = [words[i] for i in drawn.permutation(len(words))]
            for prompt, found in zip(mixed, Clip(model, tiny_clip.tokenizer()).text_features(mixed), strict=True):
                assert torch.equal(found, alone[prompt]), prompt
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("eos", ["the tokenizer's", 2])
def test_new_prompts_of_a_kind_share_a_pass_and_the_end_token_is_found(eos):
    """Configs of the first published CLIPs say 2, which transformers takes for 'the highest id'."""
    model = tiny_clip.model()
    if eos == 2:
        model.text_model.eos_token_id = model.config.text_config.eos_token_id = 2
    clip = Clip(model, tiny_clip.tokenizer())
    passes = []
    model.text_model.register_forward_hook(lambda module, args, kwargs, out: passes.append(
        tuple(kwargs["input_ids"].shape)), with_kwargs=True)  # fmt: skip
    prompts = ["a fox", "two keys", "a fox", "three", "x" * 30, "y" * 200]
    found = clip.text_features(prompts)
    assert sorted(passes) == [(2, 24), (2, 24), (2, 48), (2, 77)]
    for prompt, row in zip(prompts, found, strict=True):
        ids = clip.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").input_ids
        own = model.get_text_features(input_ids=ids).pooler_output[0]
        assert torch.allclose(row, torch.nn.functional.normalize(own, dim=-1), atol=1e-6)


def test_a_bounded_number_of_prompts_is_kept(clip, monkeypatch):
    monkeypatch.setattr("rewardtune.backbones.clip.KEPT", 3)
    wanted = clip.text_features(PROMPTS)
    assert len(clip._texts) == 3
    assert torch.equal(clip.text_features(PROMPTS), wanted)


@pytest.mark.parametrize(("height", "width"), [(61, 40), (40, 61), (200, 200)])
@pytest.mark.parametrize(("after", "mean"), [("clamp", 0.35), ("bytes", 0.25)])
def test_pixels_are_those_of_the_processor_of_transformers(height, width, after, mean):
    """In steps of 1 / 255, from bytes; the processor resizes with Pillow, which rounds and cuts off after either axis,
    so that single pixels at hard edges are further off."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    picture = to_pil(detailed_image(height, width))[0]
    wanted = processor(picture, return_tensors="pt").pixel_values
    bytes_ = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None].float() / 255
    found = Clip(tiny_clip.model(), tiny_clip.tokenizer(), after=after).pixels(bytes_)
    assert found.shape == wanted.shape
    off = (found - wanted).abs() * 0.27 * 255
    assert off.mean() < mean and off.max() < 8


def test_rounding_passes_the_gradient(clip):
    clip.after = "bytes"
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (rounded,) = torch.autograd.grad(clip.image_features(images)[:, 0].sum(), images)
    clip.after = "clamp"
    (smooth,) = torch.autograd.grad(clip.image_features(images)[:, 0].sum(), images)
    assert torch.cosine_similarity(rounded.flatten(), smooth.flatten(), dim=0) > 0.99


def test_hpsv2_equals_the_authors_code():
    figures = hps.FIGURES
    model = clip_model(hps.weights(), dtype="float32", source="figures").eval()
    pixels = torch.from_numpy(np.random.RandomState(1).standard_normal((3, 3, 28, 28)).astype(np.float32))
    with torch.no_grad():
        images = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        texts = torch.cat([
            torch.nn.functional.normalize(model.get_text_features(torch.tensor([ids])).pooler_output, dim=-1)
            for ids in figures["ids"]
        ])  # fmt: skip
    assert torch.allclose(images, torch.tensor(figures["image_features"]), atol=1e-5)
    assert torch.allclose(texts, torch.tensor(figures["text_features"]), atol=1e-5)
    assert torch.allclose((images * texts).sum(-1), torch.tensor(figures["cosine"]), atol=1e-5)
    assert model.logit_scale.exp().item() == pytest.approx(figures["logit_scale"], rel=1e-5)


def test_hpsv2_shows_the_whole_picture_with_black_around_it():
    seen = longer_side(torch.ones(1, 3, 224, 112), 224)
    assert seen.shape == (1, 3, 224, 224)
    assert torch.equal(seen[..., 56:168], torch.ones(1, 3, 224, 112)) and not seen[..., :56].any()


@pytest.mark.parametrize("version", ["1", "2"])
def test_aesthetic_heads_equal_the_authors_code(version):
    figures = HEADS[version]
    drawn = np.random.RandomState(2)
    head = make_head(version, 24).eval()
    tensors = {name: tiny_clip.normal(drawn, tuple(shape), 0.08) for name, shape in figures["keys"]}
    fill(head, tensors, reward="aesthetic", source="figures")
    embedding = torch.from_numpy(np.random.RandomState(3).standard_normal((4, 24)).astype(np.float32))
    with torch.no_grad():
        values = head(torch.nn.functional.normalize(embedding, dim=-1)).squeeze(-1)
    assert torch.allclose(values, torch.tensor(figures["values"]), atol=1e-5)
    published = {name: list(tensor.shape) for name, tensor in make_head(version, 768).state_dict().items()}
    assert published == figures["published_keys"]


def test_forms_of_clipscore_differ_by_prefix_and_factor(folder):
    images, prompts = torch.rand(2, 3, 28, 28), ["a fox", "two keys"]
    paper = load_reward("clipscore", model=str(folder))
    other = load_reward("clipscore", model=str(folder), prefix="", w=100.0)
    clip = paper.clip
    prefixed = clip.similarity(images, ["A photo depicts a fox", "A photo depicts two keys"])
    assert torch.allclose(paper.score(images, prompts).value, 2.5 * prefixed)
    assert torch.allclose(other.score(images, prompts).value, 100 * clip.similarity(images, prompts), rtol=1e-5)
    assert other.card.range == (0.0, 100.0)
    assert paper.score(images, prompts).value.mean() / paper.card.scale == pytest.approx(
        float(prefixed.mean() / 0.3), rel=1e-5
    )


def test_pickscore_is_the_models_own_logit(folder):
    reward = load_reward("pickscore", model=str(folder))
    images, prompts = torch.rand(2, 3, 28, 28), ["a fox", "two keys"]
    words = reward.clip.tokenizer(prompts, padding=True, return_tensors="pt")
    logits = reward.clip.model(**words, pixel_values=reward.clip.pixels(images)).logits_per_image
    assert torch.allclose(reward.score(images, prompts).value, logits.diagonal(), rtol=1e-5)


def test_aesthetic_versions(folder, tmp_path):
    linear = make_head("1", 24)
    torch.save(linear.state_dict(), tmp_path / "head.pth")
    reward = load_reward("aesthetic", model=str(folder), head=str(tmp_path), version="1")
    images = torch.rand(2, 3, 28, 28)
    assert torch.allclose(
        reward.score(images, ["", ""]).value, linear(reward.clip.image_features(images)).squeeze(-1).detach()
    )
    with pytest.raises(RecipeError, match=r"another model.*layers\.0\.weight"):
        load_reward("aesthetic", model=str(folder), head=str(tmp_path), version="2")


def test_a_file_that_is_not_on_the_hub_is_fetched_once_and_known_by_its_digest(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    published = tmp_path / "head.pth"
    published.write_bytes(b"weights")
    digest, url = hashlib.sha256(b"weights").hexdigest(), published.as_uri()
    found = download(url, digest, reward="aesthetic", option="head")
    assert found.read_bytes() == b"weights" and found.parent == tmp_path / "cache/checkpoints"
    published.unlink()
    assert download(url, digest, reward="aesthetic", option="head") == found
    found.write_bytes(b"other")
    with pytest.raises(RecipeError, match=r"'aesthetic'.*damaged.*Delete it"):
        download(url, digest, reward="aesthetic", option="head")
    found.unlink()
    with pytest.raises(RecipeError, match=r"cannot be fetched.*give the file as head"):
        download(url, digest, reward="aesthetic", option="head")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"HF_HUB_OFFLINE is set.*give the file as head"):
        download(url, digest, reward="aesthetic", option="head")


class Trap:
    """What unpickling would run."""

    def __reduce__(self):
        return (print, ("ran",))


def test_weights_that_are_none_are_refused(folder, tmp_path, capsys):
    def files(name: str) -> dict[str, str]:
        return {"model": str(tmp_path / name), "tokenizer": str(folder)}

    def refused(name: str, text: str) -> None:
        with pytest.raises(RecipeError, match=text) as caught:
            load_reward("hpsv2", **files(name))
        assert "'hpsv2'" in str(caught.value)

    whole = hps.weights()
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    refused("cut.pt", "cannot be read.*damaged")
    torch.save({"state_dict": whole, "more": Trap()}, tmp_path / "trap.pt")
    refused("trap.pt", "can run code")
    assert "ran" not in capsys.readouterr().out
    torch.save(whole, tmp_path / "bare.pt")
    refused("bare.pt", "no 'state_dict'.*another model")
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "other.pt")
    refused("other.pt", "another model.*rewards show hpsv2")
    torch.save({"state_dict": {k: v for k, v in whole.items() if "resblocks.1.ln_1" not in k}}, tmp_path / "less.pt")
    refused("less.pt", "missing.*layers.1.layer_norm1")
    torch.save({"state_dict": whole | {"visual.head.weight": torch.ones(1)}}, tmp_path / "more.pt")
    refused("more.pt", r"left over \(visual.head.weight\)")
    refused("nowhere.pt", "no file, no folder and no hub id")


def test_a_transformers_folder_of_another_model_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import SiglipConfig

    SiglipConfig().save_pretrained(tmp_path / "siglip")
    with pytest.raises(RecipeError, match=r"'pickscore'.*is a siglip model"):
        load_reward("pickscore", model=str(tmp_path / "siglip"))
    with pytest.raises(RecipeError, match=r"'pickscore'.*does not load"):
        load_reward("pickscore", model=str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    tiny_clip.save(broken)
    tensors = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "final_layer_norm" not in k}, broken / "model.safetensors")
    with pytest.raises(RecipeError, match=r"'pickscore'.*another model.*missing.*final_layer_norm"):
        load_reward("pickscore", model=str(broken))
    (broken / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(RecipeError, match=r"'pickscore'.*weights do not load"):
        load_reward("pickscore", model=str(broken))
