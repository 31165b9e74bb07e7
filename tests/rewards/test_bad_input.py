"""Bad input x every reward of the table: one error that names reward, argument and remedy; never a score."""

from __future__ import annotations

import importlib.util
import re
import shutil
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from backend import Backend, backends
from judge_stub import Stub, said
from safetensors.torch import save_file

from rewardtune import load_reward, registry
from rewardtune.data.references import resolve
from rewardtune.errors import DataError, MissingExtra, NonFiniteError, RecipeError
from rewardtune.plugins import Reward
from rewardtune.serving import connection
from rewardtune.types import Prompt

BACKENDS = backends()
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
FINE = torch.linspace(0, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
PROMPTS = (Prompt("a red fox"), Prompt("two keys"))


@pytest.mark.parametrize(
    "name", ["clipscore", "pickscore", "hpsv2", "hpsv3", "imagereward", "qrealign", "vqascore", "detection-counts"]
)
def test_weights_that_a_variable_keeps_from_being_fetched(name, tmp_path, monkeypatch):
    """The libraries speak of the connection, whatever forbade it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match=f"'{name}'.*HF_HUB_OFFLINE is set, so the hub was not asked"):
        load_reward(name)


def with_a_hole(images: torch.Tensor) -> torch.Tensor:
    holed = images.clone()
    holed[1, 2, 5, 7] = float("nan")
    return holed


IMAGES = {
    "greyscale": (FINE[:, :1], r"images.*\(2, 1, 64, 64\).*greyscale: images\.expand"),
    "RGBA": (FINE[:, [0, 1, 2, 0]], r"images.*four channels: put them on a background"),
    "bytes": ((FINE * 255).to(torch.uint8), r"images.*uint8.*images\.float\(\) / 255"),
    "0 to 255": (FINE * 255, r"images.*from 0 to 255.*images / 255"),
    "-1 to 1": (FINE * 2 - 1, r"images.*from -1 to 1.*images / 2 \+ 0\.5"),
    "NaN": (with_a_hole(FINE), r"images \[1\] of the batch hold NaN.*Look at what made them"),
    "channels last": (FINE.permute(0, 2, 3, 1), r"images.*permute\(0, 3, 1, 2\)"),
    "no batch": (FINE[0], r"images.*Add the batch"),
}


@cache
def loaded(name: str, options: tuple) -> Reward:
    return load_reward(BACKENDS[name].name, **dict(options))


@pytest.fixture(params=BACKENDS)
def name(request) -> str:
    return request.param


@pytest.fixture
def backend(name: str) -> Backend:
    return BACKENDS[name]


@pytest.fixture
def reward(name: str, made) -> Reward:
    return loaded(name, tuple(made(name).items()))


@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_it_cannot_judge(kind, backend, reward):
    images, expected = IMAGES[kind]
    prompts = list(backend.prompts())[:2] if backend.prompts else list(PROMPTS)
    with pytest.raises((DataError, NonFiniteError), match=f"reward '{reward.card.name}': {expected}"):
        reward.score(images, prompts)


def test_prompts_that_do_not_fit(backend, reward):
    prompts = list(backend.prompts())[:2] if backend.prompts else list(PROMPTS)
    named = f"reward '{reward.card.name}'"
    for given in (prompts[:1], [*prompts, prompts[0]], []):
        with pytest.raises(DataError, match=rf"{named}: 2 images came with {len(given)} prompts.*one an image"):
            reward.score(FINE, given)
    with pytest.raises(DataError, match=rf"{named}: prompts must be a list.*\[prompt\] \* len\(images\)"):
        reward.score(FINE, "a red fox")
    with pytest.raises(DataError, match=rf"{named}: prompt 1 is NoneType.*Give ''"):
        reward.score(FINE, [prompts[0], None])
    for key in reward.card.metadata:
        with pytest.raises(DataError, match=rf"{named}: prompt 0, 'a red fox', lacks the metadata .*'{key}'.*jsonl"):
            reward.score(FINE, [Prompt("a red fox")] * 2)


def test_an_option_that_it_has_not(backend, made, name):
    with pytest.raises(RecipeError, match=rf"^reward '{backend.name}'.*colour.*rewards show {backend.name}"):
        load_reward(backend.name, **made(name), colour="red")


def test_an_extra_that_is_not_installed(backend, made, name, monkeypatch):
    card = registry.rewards.card(backend.name)
    there = importlib.util.find_spec
    for module in card.requires:
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, gone=module: None if n == gone else there(n))
        remedy = rf"pip install '?(rewardtune\[{card.extra}\]|{module})"
        with pytest.raises(MissingExtra, match=rf"^reward '{backend.name}' needs {module}, which is not.*{remedy}"):
            load_reward(backend.name, **made(name))


# ------------------------------------------------------------------------------------------------------------ weights

FILES = {
    "aesthetic": ("model", "head"), "clipscore": ("model",), "detection_counts": ("checkpoint",), "hpsv2": ("model",),
    "hpsv3": ("checkpoint",), "imagereward": ("checkpoint",), "ocr": ("recogniser",), "pickscore": ("model",),
    "qrealign": ("checkpoint",), "rewarddance": ("checkpoint",), "vqascore": ("checkpoint",),
    "zreward": ("checkpoint",),
}  # fmt: skip
"""Options that name a file or folder with weights. The other rewards take none from a user."""
NONE = {"http_judge", "jpeg_size", "ocr_edit_distance", "pocket_oracle", "remote"}
EACH = [(name, option) for name, options in FILES.items() for option in options]


def test_every_option_with_weights_is_listed():
    assert FILES.keys() | NONE == BACKENDS.keys()
    named = {"model", "checkpoint", "head", "recogniser"}
    for name, backend in BACKENDS.items():
        config = registry.rewards.load_class(backend.name).Config
        assert named & set(config.model_fields) == set(FILES.get(name, ())), name


def copied(name: str, option: str, given: dict, folder: Path) -> tuple[dict, list[Path]]:
    """Options whose weights are a copy, to be spoiled, and the files that hold them."""
    if name == "ocr":
        from rewardtune.backbones.text_reader import shipped_recogniser

        given = {"recogniser": str(shipped_recogniser())}
    if name == "zreward":
        given = {"checkpoint": str(resolve("pocket:zreward"))}
    source = Path(given[option])
    copy = folder / source.name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    found = [copy] if copy.is_file() else [file for file in copy.iterdir() if file.suffix in WEIGHTS]
    assert found
    return {**given, option: str(copy)}, found


@pytest.mark.parametrize(("name", "option"), EACH)
def test_weights_that_are_cut_off(name, option, made, tmp_path):
    backend = BACKENDS[name]
    options, files = copied(name, option, made(name), tmp_path)
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    place = re.escape(str(tmp_path))
    remedy = "fetch it again|fetch its files again|Fetch it again|Install it again"
    with pytest.raises(RecipeError, match=rf"^reward '{backend.name}': .*{place}(.|\n)*({remedy})"):
        load_reward(backend.name, **options)


@pytest.mark.parametrize(("name", "option"), EACH)
def test_weights_of_another_model(name, option, made, tmp_path):
    """In a file that is whole and has the right name: transformers alone would go on with random weights."""
    backend = BACKENDS[name]
    options, files = copied(name, option, made(name), tmp_path)
    other = {"conv1.weight": torch.ones(4, 3, 3, 3), "fc.bias": torch.ones(4)}
    for file in files:
        file.unlink()
        if file.suffix == ".safetensors":
            save_file(other, file, metadata={"format": "pt"})
        elif file.suffix == ".onnx":
            write_onnx(file)
        else:
            torch.save(other, file)
    place = re.escape(str(tmp_path))
    with pytest.raises(RecipeError, match=rf"^reward '{backend.name}': .*{place}(.|\n)*(another model|no PP-OCR)") as e:
        load_reward(backend.name, **options)
    assert any(word in str(e.value) for word in ("Give", "give", "Fetch")), e.value


@pytest.mark.parametrize(("name", "option"), [pair for pair in EACH if pair[1] in ("model", "checkpoint")])
def test_a_folder_of_another_kind(name, option, made, tmp_path):
    """Whole and of a real class, which is not the one that the reward stands on."""
    backend, other = BACKENDS[name], "vqascore" if option == "model" else "clipscore"
    folder = next(str(value) for key, value in made(other).items() if key in ("model", "checkpoint"))
    with pytest.raises(RecipeError, match=rf"^reward '{backend.name}': {option} '{folder}'.*") as e:
        load_reward(backend.name, **{**made(name), option: folder})
    assert any(word in str(e.value) for word in ("Give", "must be", "stands on", "Put it there")), e.value


def write_onnx(file: Path) -> None:
    """A real graph that reads no text."""
    import onnx

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Softmax", ["x"], ["y"])], "other",
        [value("x", onnx.TensorProto.FLOAT, [1, 3, 48, None])], [value("y", onnx.TensorProto.FLOAT, [1, 3, 48, None])],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), file)


# ------------------------------------------------------------------------------------------------------------- servers


@pytest.fixture
def prose():
    """An address where something answers every request with a sentence."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"What a lovely picture of a fox, I would give it a nine.")

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answer", ["probabilities", "level", "final-score", "unified-reward", "rational-rewards"])
def test_a_judge_that_answers_prose(answer):
    """In the protocol, but no score."""
    judge = Stub()
    judge.say = lambda body, text, pixels: said("What a lovely picture of a fox, nine of ten!")
    threading.Thread(target=judge.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        reward = load_reward("http-judge", url=judge.url, served_model="judge", answer=answer, repeats=1)
        remedy = "answer: level" if answer == "probabilities" else answer
        with pytest.raises(DataError, match=rf"reward 'http-judge': {judge.url}(.|\n)*{remedy}"):
            reward.score(FINE, list(PROMPTS))
    finally:
        judge.shutdown()
        judge.server_close()


def test_an_address_where_something_else_answers(prose, monkeypatch):
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("REWARDTUNE_TOKEN", "a token of a test")
    reward = load_reward("http-judge", url=prose, served_model="judge", repeats=0, retries=1)
    with pytest.raises(DataError, match=rf"reward 'http-judge': {prose}.*not JSON"):
        reward.score(FINE, list(PROMPTS))
    with pytest.raises(RecipeError, match=rf"reward 'remote': something answers at {prose}.*Give the address"):
        load_reward("remote", url=prose, retries=1)
    with pytest.raises(RecipeError, match=r"reward 'remote': .*127\.0\.0\.1:9 .*Start one there"):
        load_reward("remote", url="http://127.0.0.1:9", retries=0)
    monkeypatch.delenv("REWARDTUNE_TOKEN")
    with pytest.raises(RecipeError, match=r"reward 'remote': .*REWARDTUNE_TOKEN is not set\."):
        load_reward("remote", url=prose)
