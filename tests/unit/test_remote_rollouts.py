"""GDSO with its roll-outs on a server against the same run in process, and what may go wrong on the way."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import vllm_stub
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from tiny_scorer import NAMES, pictures, write_reasoner
from vllm_stub import VllmStub, changed, silent, status

from rewardtune.data.images import to_pil
from rewardtune.errors import DataError, RecipeError
from rewardtune.randomness import key
from rewardtune.recipe.sections import Recipe, RewardGdsoRecipe
from rewardtune.scorer.model import load_scorer
from rewardtune.scorer.remote_rollouts import RemoteSampler
from rewardtune.tasks.reward_gdso import RewardGdso, build_reward_gdso
from rewardtune.training.loop import train
from rewardtune.training.track import read_metrics

HERE = Path(__file__).parent
G = 2
KEYS = [(0, "gdso/trace", index, side, one) for index in range(12) for side in (0, 1) for one in range(G)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_reasoner(folder / "reasoner", layers=["linear_attention", "full_attention"])
    rows = []
    for index, picture in enumerate(to_pil(pictures(4))):
        picture.save(folder / f"{index}.png")
        scores = dict.fromkeys(NAMES, 1.0 + index)
        rows.append({"group": str(index // 2), "prompt": f"a dog {index // 2} ", "image": f"{index}.png",
                     "scores": scores})  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def stub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmStub]:
    monkeypatch.setenv("no_proxy", "*")
    with VllmStub(root / "reasoner", prompts=["a dog 0 ", "a dog 1 "], keys=KEYS) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.let_go.set()
        running.shutdown()
        assert not running.unmet, running.unmet


def recipe(root: Path, server: dict[str, Any] | None = None, **objective: Any) -> RewardGdsoRecipe:
    content: dict[str, Any] = {
        "task": "reward_gdso", "scorer": {"model": str(root / "reasoner"), "lora": {"rank": 4, "alpha": 8}},
        "data": {"records": str(root / "records.jsonl")}, "optimizer": {"lr": 0.02},
        "objective": {"group_size": G, "kl": 0.1, "reference_every": 2, **objective},
        "train": {"steps": 3, "batch_size": 2, "accumulation": 2, "device": "cpu"},
    }  # fmt: skip
    if server is not None:
        content["objective"]["rollouts"] = server
    made: Any = TypeAdapter(Recipe).validate_python(content)
    return made


def remote(root: Path, stub: VllmStub, folder: Path, **objective: Any) -> RewardGdso:
    """The task with its roll-outs on the stub; no pause is waited for."""
    server = {"url": stub.url(), "retries": 2, "concurrency": 2, "timeout": 30.0}
    task = build_reward_gdso(recipe(root, {"server": server, "adapters": str(folder)}, **objective), device="cpu")
    assert task.remote is not None
    task.remote.sleep = lambda seconds: None
    return task


def run(task: RewardGdso, made: RewardGdsoRecipe, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    train(task, folder=folder, train=made.train, optimizer=made.optimizer, **settings)
    return read_metrics(folder / "metrics.jsonl")


TOO = {"rollout_dropped", "rollout_gap", "seconds"}


@pytest.mark.parametrize("objective", [{}, {"updates_per_rollout": 2, "clip": 0.2, "reward": "parsed"}])
def test_a_run_over_the_line_is_the_run_in_process(
    root: Path, stub: VllmStub, tmp_path: Path, objective: dict[str, Any]
) -> None:
    made = recipe(root, **objective)
    here = run(build_reward_gdso(made, device="cpu"), made, tmp_path / "here")
    folder = tmp_path / "adapters"
    there = run(remote(root, stub, folder, **objective), made, tmp_path / "there")
    for mine, theirs in zip(here, there, strict=True):
        assert set(theirs) - set(mine) == TOO - {"seconds"}
        for name in set(mine) - TOO:
            assert theirs[name] == pytest.approx(mine[name], abs=1e-5, rel=1e-4), name
        assert theirs["rollout_dropped"] == 0 and theirs["rollout_gap"] < 1e-4
    # a version for each roll-out, in their order; the former one is gone before the next one comes
    steps = range(0, 3, objective.get("updates_per_rollout", 1))
    kinds = [kind for kind, _ in stub.order]
    assert kinds == ["load", *["unload", "load"] * (len(steps) - 1)]
    loaded = [name for kind, name in stub.order if kind == "load"]
    assert [name for kind, name in stub.order if kind == "unload"] == loaded[:-1]
    assert [int(name.split("-")[1]) for name in loaded] == [*steps]
    assert [path.name for path in folder.iterdir()] == [*stub.adapters] == loaded[-1:]
    assert len({body["sampling_params"]["seed"] for body in stub.asked}) == len(stub.asked) == len(steps) * 2 * 2 * G
    assert sum(float(b.abs().sum()) for name, b in stub.adapters[loaded[-1]].items() if "lora_B" in name) > 0


def test_a_stop_inside_a_roll_out_changes_nothing(root: Path, stub: VllmStub, tmp_path: Path) -> None:
    two = {"updates_per_rollout": 2, "clip": 0.2}
    made = recipe(root, **two)
    whole = run(remote(root, stub, tmp_path / "a", **two), made, tmp_path / "whole")
    asked = len(stub.asked)
    for until in (1, 2, 3):
        cut = run(remote(root, stub, tmp_path / "b", **two), made, tmp_path / "cut", until=until)
    assert [{**line, "seconds": 0} for line in cut] == [{**line, "seconds": 0} for line in whole]
    assert len(stub.asked) == 2 * asked  # the second step took its traces from the checkpoint
    assert {body["sampling_params"]["seed"] for body in stub.asked[asked:]} == {
        body["sampling_params"]["seed"] for body in stub.asked[:asked]
    }


@pytest.mark.timeout(900)
def test_two_processes_share_an_adapter_split_or_not(root: Path, stub: VllmStub, tmp_path: Path) -> None:
    server = {"url": stub.url(), "timeout": 60.0}
    made = recipe(root, {"server": server, "adapters": str(tmp_path / "adapters")})
    content = {**made.model_dump(exclude_unset=True), "train": {"steps": 2, "batch_size": 2, "device": "cpu"}}
    given = {"CASES": {"remote": {"recipe": content}}, "PLUGIN": str(HERE / "redness.py"), "ROOT": str(tmp_path)}
    running = [
        processes.start(HERE / "sharded_tasks.py", {**given, "RESULT": str(tmp_path / f"{rank}.json"),
                                                    "ENV": {**env, "no_proxy": "*"}})
        for rank, env in enumerate(processes.group(2))
    ]  # fmt: skip
    processes.join(running, lambda: [path.read_text() for path in tmp_path.glob("[01].json")])
    alone = run(build_reward_gdso(recipe(root), device="cpu"), made, tmp_path / "alone", until=2)
    for how in ("plain", "sharded"):
        lines = read_metrics(tmp_path / "remote" / how / "metrics.jsonl")
        for mine, theirs in zip(alone, lines, strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-4, rel=1e-3)
            assert theirs["trace_tokens"] == mine["trace_tokens"] and theirs["rollout_gap"] < 1e-4
    # one process loads: each version once a run
    assert [kind for kind, _ in stub.order] == ["load", "unload", "load", "unload", "load", "unload", "load"]


def test_peft_loads_the_adapter_and_gives_the_same_scores(root: Path, stub: VllmStub, tmp_path: Path) -> None:
    from peft import PeftModel

    task = remote(root, stub, tmp_path)
    with torch.no_grad():
        for name, parameter in task.reasoner.scorer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    batch = task.batch(0, [0])
    (folder,) = tmp_path.iterdir()
    base = load_scorer(root / "reasoner")
    start = base.logits(batch.images, ["a dog"] * len(batch.images))
    loaded = PeftModel.from_pretrained(base.model, str(folder))
    assert not [name for name in loaded.load_adapter(str(folder), "again").missing_keys if "lora" in name]
    wanted = task.reasoner.scorer.logits(batch.images, ["a dog"] * len(batch.images))
    found = base.logits(batch.images, ["a dog"] * len(batch.images))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found - start).abs().max() > 0.1


def test_a_server_with_other_weights_shows_in_the_gap(root: Path, stub: VllmStub, tmp_path: Path) -> None:
    task = remote(root, stub, tmp_path)
    batch = task.batch(0, [0, 1])
    assert task.step(batch).metrics["rollout_gap"] < 1e-4
    with torch.no_grad():
        for name, parameter in task.reasoner.scorer.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    assert task.step(batch).metrics["rollout_gap"] > 0.01


def test_at_another_temperature_there_is_nothing_to_compare(root: Path, stub: VllmStub, tmp_path: Path) -> None:
    made = recipe(root, temperature=0.7)
    here, task = build_reward_gdso(made, device="cpu"), remote(root, stub, tmp_path, temperature=0.7)
    batch = task.batch(0, [0, 1])
    assert batch.traces == here.batch(0, [0, 1]).traces
    assert "logprobs" not in stub.asked[0]["sampling_params"] and "rollout_gap" not in task.step(batch).metrics


@pytest.mark.parametrize("kind", ["load", "generate"])
@pytest.mark.parametrize("fault", [status(503), status(500), status(429), silent], ids=["503", "500", "429", "silent"])
def test_a_passing_fault_changes_nothing(
    root: Path, stub: VllmStub, tmp_path: Path, kind: str, fault: vllm_stub.Fault
) -> None:
    well = build_reward_gdso(recipe(root), device="cpu").batch(0, [0])
    stub.plan[kind] = [fault, fault] if fault is not silent else [fault]
    task = remote(root, stub, tmp_path)
    assert task.remote is not None
    task.remote.timeout = 1.5 if fault is silent else 30.0
    assert task.batch(0, [0]).traces == well.traces
    # the first load was heard: its repetition is told so, and that is no error
    assert [name for name, _ in stub.order] == ["load"]


def lost(*seeds: int) -> vllm_stub.Fault:
    """The server fails for these seeds, however often it is asked."""

    def fault(handler: vllm_stub.Handler, good: Any) -> Any:
        body = handler.server.asked[-1]
        return handler.send(500, {}) if body["sampling_params"]["seed"] in seeds else good

    return fault


def seed(index: int, side: int, one: int) -> int:
    return key(0, "gdso/trace", index, side, one) % 2**31


def test_a_pair_that_lost_a_trace_is_left_out_counted_and_named(
    root: Path, stub: VllmStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {"updates_per_rollout": 2, "clip": 0.2, "reward": "parsed"}
    whole = remote(root, stub, tmp_path / "whole", **two).batch(0, [0, 1])
    stub.always["generate"] = lost(seed(0, 1, 0))
    task = remote(root, stub, tmp_path / "part", **two)
    assert task.remote is not None
    task.remote.concurrency = 1  # the stub's faults look at the newest request
    batch = task.batch(0, [0, 1])
    assert batch.pairs == whole.pairs[1:] and batch.traces == whole.traces[2 * G :] and batch.dropped == 0.5
    assert torch.equal(batch.drawn, whole.drawn[1:])
    (gone,) = (pair for pair in whole.pairs if pair not in batch.pairs)
    said = capsys.readouterr().err
    assert "1 of 8 traces of step 0 are lost, and their pairs left out" in said
    name = f"'{gone.prompt}' in {task.reasoner.scorer.dimensions[gone.dimension]}"
    assert f"because the server answered 500: {{}}: 1 ({name})" in said
    assert task.step(batch).metrics["rollout_dropped"] == 0.5
    # a checkpoint remembers which one it was
    again = remote(root, stub, tmp_path / "part", **two)
    again.recall(1, {name: value.clone() for name, value in task.memory().items()})
    back = again.batch(1, [2, 3])
    assert back.pairs == batch.pairs and back.traces == batch.traces and back.dropped == 0.5
    assert torch.equal(task.step(batch).loss, again.step(back).loss)
    stub.always["generate"] = lost(seed(2, 1, 0), seed(3, 0, 1))
    with pytest.raises(DataError, match="each of the 2 pairs of a roll-out lost a trace"):
        task.batch(2, [4, 5])


def test_pictures_go_in_the_size_in_which_they_are_read_here(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A recipe's budget is narrower than the checkpoint's bounds, which are the server's: both see as many tokens."""
    monkeypatch.setenv("no_proxy", "*")
    shutil.copytree(root, tmp_path / "root")
    root = tmp_path / "root"
    file = root / "reasoner/preprocessor_config.json"
    size = {"shortest_edge": 64, "longest_edge": 4096}
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": size}))
    for index, picture in enumerate(to_pil(pictures(4, size=(40, 24)))):
        picture.save(root / f"{index}.png")
    with VllmStub(root / "reasoner", prompts=["a dog 0 ", "a dog 1 "], keys=KEYS) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server = {"server": {"url": running.url(), "retries": 0}, "adapters": str(tmp_path / "adapters")}
        made = recipe(root, server)
        made = made.model_copy(update={"scorer": made.scorer.model_copy(update={"max_pixels": 384})})
        batch = build_reward_gdso(made, device="cpu").batch(0, [0, 1])
        assert len(batch.traces) == 2 * 2 * G and batch.dropped == 0
        sent = [part["url"] for body in running.asked for part in body.get("content_parts", [])]
        sizes = {Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in sent}
        # 24 x 40 pixels are 15 tokens of 8 x 8 each, and six are allowed
        assert sizes == {(8, 24)}
        running.shutdown()
        assert not running.unmet


def test_too_many_lost_traces_end_the_run(root: Path, stub: VllmStub, tmp_path: Path) -> None:
    stub.always["generate"] = status(500)
    with pytest.raises(DataError, match=r"(?s)traces \(8 were asked for\) are unscorable, more than the 50%.*retries"):
        remote(root, stub, tmp_path).batch(0, [0, 1])


@pytest.mark.parametrize(
    ("kind", "fault", "error", "message"),
    [
        ("load", lambda h, g: h.send(404, {"detail": "Not Found"}), RecipeError,
         "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 4"),
        ("load", status(404, "Loading lora x failed: No adapter found for /there"), RecipeError, "under the same path"),
        ("load", status(401), RecipeError, "key_variable"),
        ("generate", lambda h, g: h.send(404, {"detail": "Not Found"}), RecipeError, "--enable-scale-out"),
        ("generate", status(403, "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out"),
         RecipeError, "Restart vllm serve with --enable-scale-out"),
        ("generate", status(401), RecipeError, "key_variable"),
        ("generate", status(404, "The model `x` does not exist."), RecipeError, "has lost the adapter rewardtune-0000"),
        ("generate", status(400, "The decoder prompt is too long"), RecipeError, "max-model-len"),
        ("generate", changed(prompt_token_ids=None), RecipeError, "does not say which tokens it read"),
        ("generate", changed(prompt_token_ids=[1, 2, 3]), RecipeError, "makes 0 tokens of a picture"),
        ("generate", lambda h, g: {**g, "prompt_token_ids": [9, *g["prompt_token_ids"]]}, RecipeError,
         "the first that differs is number 1"),
        ("generate", changed(token_ids=[5] * 99, finish_reason="length"), DataError, "longer than max_tokens"),
        ("generate", changed(token_ids=[5], finish_reason="stop"), DataError, "stopped at another token"),
        ("generate", changed(finish_reason="abort"), DataError, "finished with 'abort'"),
        ("generate", changed(token_ids="text"), DataError, "no token ids"),
        ("generate", changed(logprobs={"content": []}, token_ids=[5], finish_reason="length"), DataError, "too few"),
        ("generate", lambda h, g: b"[" * 9, DataError, "not JSON"),
    ],
)  # fmt: skip
def test_what_the_server_cannot_do_is_said(
    root: Path, stub: VllmStub, tmp_path: Path, kind: str, fault: vllm_stub.Fault, error: type[Exception], message: str
) -> None:
    stub.always[kind] = fault
    with pytest.raises(error) as caught:
        remote(root, stub, tmp_path).batch(0, [0])
    assert message in str(caught.value)


def test_an_adapter_that_is_too_large_for_the_server(root: Path, stub: VllmStub, tmp_path: Path) -> None:
    stub.rank = 2
    with pytest.raises(DataError, match=r"500: LoRA rank 4 is greater.*--max-lora-rank 4 or more"):
        remote(root, stub, tmp_path).batch(0, [0])


def test_a_server_that_was_started_anew_is_given_the_weights_again(
    root: Path, stub: VllmStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote(root, stub, tmp_path).batch(0, [0])
    stub.adapters.clear()
    task = remote(root, stub, tmp_path)
    task.batch(1, [2])
    assert "warning" not in capsys.readouterr().err and len(stub.adapters) == 1
    # what stays behind in the server's list is no reason to end a run
    stub.always["unload"] = status(403)
    task.batch(2, [4])
    assert "does not unload the adapter" in capsys.readouterr().err


def test_a_server_that_does_not_stop_is_cut_where_the_reasoning_ends(
    root: Path, stub: VllmStub, tmp_path: Path
) -> None:
    stop = stub.reasoner.reading.stop

    def on(handler: vllm_stub.Handler, good: Any) -> Any:
        logprobs = {"content": [{"logprob": -1.0}] * 4}
        return changed(token_ids=[9, stop, 8, stop], finish_reason="length", logprobs=logprobs)(handler, good)

    stub.always["generate"] = on
    traces = remote(root, stub, tmp_path).batch(0, [0]).traces
    assert {(t.ids, t.ended, t.log_probs) for t in traces} == {((9,), True, (-1.0, -1.0))}


def test_roll_outs_on_a_server_need_adapters_and_an_address(root: Path) -> None:
    made = recipe(root, {"server": {"url": "http://localhost:8000/v1"}, "adapters": "shared"}).model_dump()
    del made["scorer"]["lora"]
    with pytest.raises(ValidationError, match=r"objective\.rollouts needs scorer\.lora"):
        RewardGdsoRecipe.model_validate(made)
    build: Callable[..., RemoteSampler] = RemoteSampler
    with pytest.raises(RecipeError, match="without user or password"):
        build(None, Path("x"), "http://me:secret@h/v1")
