"""A served reward equals the one in this process bit for bit, and every way to go wrong says what to do."""

from __future__ import annotations

import http.client
import json
import threading
import time

import pytest
import torch
from served import TOKEN, serving

from rewardtune import load_reward
from rewardtune.errors import DataError, NonFiniteError, OutOfMemoryError, PluginError, RecipeError
from rewardtune.plugins import RewardCard
from rewardtune.scoring.objective import statistic
from rewardtune.scoring.reward_set import RewardSet, Term
from rewardtune.serving import client, server, wire
from rewardtune.serving.connection import Key
from rewardtune.serving.server import Limits
from rewardtune.types import Prompt, Score

PROMPTS = ["a red fox to the left of two keys", "", "a fox 🦊 \u202bשועל\u202c"]
CARD = RewardCard("toy", "a toy", differentiable=True, needs_prompt=False, range=(0.0, 1.0), native_resolution=16)


def pictures(count: int = 3, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(7))


class Toy:
    """Mean of the squared pixels; tests set `answer` and `card`."""

    def __init__(self, answer=None, card=CARD):
        self.card, self.answer, self.seen = card, answer, []

    def score(self, images, prompts):
        self.seen.append((torch.is_grad_enabled(), images, prompts))
        return self.answer(images, prompts) if self.answer else Score((images**2).mean((1, 2, 3)))


def load_remote(where, *, token=TOKEN, retries=0, pauses=None, **more):
    note = pauses.append if pauses is not None else lambda seconds: None
    return client.RemoteReward(where.url, Key(token, "a test"), retries=retries, sleep=note, **more)


# ------------------------------------------------------------------------------------------------------- the same bits


@pytest.fixture(scope="module")
def pair():
    """The shipped student, in this process and served."""
    here = load_reward("zreward")
    with serving(load_reward("zreward"), options={"name": "zreward"}) as served:
        yield here, load_remote(served), served


def both(pair, use):
    found = []
    for reward in pair[:2]:
        leaf = pictures().requires_grad_()
        score = reward.score(leaf, PROMPTS)
        use(score).backward()
        found.append((score, leaf.grad))
    return found


@pytest.mark.parametrize(
    "use",
    [
        lambda score: score.value.sum(),
        lambda score: (score.distribution**2).sum() + 3 * score.value[1],
        lambda score: score.parts["realism"][2] - score.parts["alignment"].sum(),
    ],
    ids=["value", "distribution", "parts"],
)
def test_value_and_gradient_are_bit_for_bit_those_of_one_process(pair, use):
    (a, grad_a), (b, grad_b) = both(pair, use)
    assert torch.equal(a.value, b.value) and b.value.dtype == torch.float32
    assert torch.equal(a.distribution, b.distribution) and torch.equal(a.levels, b.levels)
    assert a.dimensions == b.dimensions and list(a.parts) == list(b.parts)
    assert all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)
    assert torch.equal(grad_a, grad_b) and bool(grad_a.any())


@pytest.mark.parametrize(
    "term",
    [
        {},
        {"statistic": statistic("mean-minus-deviation", weight=0.5), "dimensions": {"realism": 2.0, "alignment": 1.0}},
        {"statistic": statistic("lower-tail-mean", share=0.3), "ceiling": 4.0},
    ],
    ids=["expectation", "mean minus deviation, weighted", "lower tail"],
)
def test_every_statistic_has_the_gradient_of_one_process(pair, term):
    found = []
    for reward in pair[:2]:
        rewards = RewardSet([Term(reward, **term)])
        found.append(rewards.gradient(pictures(), PROMPTS, torch.tensor([1.0, 0.5, 2.0]), balance="value"))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2], "the same names and numbers in the log"


def test_without_a_graph_no_gradient_is_asked_for(pair):
    here, there, served = pair
    served.lines.clear()
    with torch.no_grad():
        score = there.score(pictures().requires_grad_(), PROMPTS)
    plain = there.score(pictures(), PROMPTS)
    assert not score.value.requires_grad and not plain.value.requires_grad
    with torch.no_grad():
        assert torch.equal(here.score(pictures(), PROMPTS).value, score.value)
    assert [line.split()[1:4] for line in served.lines] == [["POST", "/score", "200:"]] * 2


def test_the_card_is_the_served_one(pair, tmp_path):
    here, there, served = pair
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    reward = load_reward("remote", url=served.url, token_file=str(tmp_path / "token"), retries=0)
    assert reward.card.name == "zreward" and reward.card.dimensions == here.card.dimensions
    assert reward.card.range == here.card.range and served.url in reward.card.summary
    assert there.card == here.card


def test_the_contract_checks_pass_through_the_line():
    from rewardtune.scoring.checks import check_reward

    with serving(Toy()) as served:
        failed = [f"{c.name}: {c.found}" for c in check_reward(load_remote(served)) if not c.passed]
    assert not failed


def test_metadata_and_dtype_arrive_as_they_were():
    toy = Toy()
    prompts = [Prompt("a", {"facts": ({"kind": "count", "n": 2},), "box": [0.5, None]}), "b"]
    with serving(toy) as served:
        line = load_remote(served)
        leaf = pictures(2, 4).bfloat16().requires_grad_()
        line.score(leaf, prompts).value.sum().backward()
        assert leaf.grad.dtype == torch.bfloat16
        for _, images, seen in toy.seen:
            assert torch.equal(images, leaf) and seen == ["a", "b"]
            assert seen[0].metadata == {"facts": [{"kind": "count", "n": 2}], "box": [0.5, None]}
            assert seen[1].metadata == {}
        assert [grad for grad, _, _ in toy.seen] == [False, True], "no graph is built for a score"
        with pytest.raises(DataError, match="metadata of a prompt cannot be sent"):
            line.score(leaf, [Prompt("a", {"x": object()}), "b"])


def test_parts_that_say_nothing_stay_so_and_integers_carry_no_graph():
    def answer(images, prompts):
        gaps = torch.tensor([float("nan"), 1.0])
        return Score(images.mean((1, 2, 3)), parts={"facts/count": gaps, "n": torch.tensor([3, 4])})

    with serving(Toy(answer)) as served:
        score = load_remote(served).score(pictures(2, 4).requires_grad_(), ["a", "b"])
    assert score.parts["facts/count"].isnan().tolist() == [True, False]
    assert score.parts["n"].tolist() == [3, 4] and not score.parts["n"].requires_grad


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_wrong_or_missing_token_opens_nothing():
    with serving(Toy()) as served:
        with pytest.raises(RecipeError, match=r"refuses the token that was read from a test"):
            load_remote(served, token="another token of a test")
        line = load_remote(served)
        served.token = "a token that was changed"
        with pytest.raises(RecipeError, match=f"{served.url} refuses the token"):
            line.score(pictures(), PROMPTS)
        assert served.reward.seen == []
        assert _raw(served, "GET", "/health", token=None) == (200, {"status": "ok", "protocol": 1})
        assert _raw(served, "GET", "/card", token=None)[0] == 401
        assert _raw(served, "POST", "/gradient", GOOD, token="")[0] == 401
        assert not any("token of" in line for line in served.lines)


def test_a_token_must_be_long_and_come_from_somewhere(monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match="shorter than 16"), serving(Toy(), token="short"):
        pass
    monkeypatch.delenv("REWARDTUNE_TOKEN", raising=False)
    with pytest.raises(RecipeError, match=r"REWARDTUNE_TOKEN is not set.*token_file"):
        load_reward("remote", url="http://127.0.0.1:9")
    with pytest.raises(RecipeError, match="the key cannot be read"):
        load_reward("remote", url="http://127.0.0.1:9", token_file=str(tmp_path / "none"))
    assert len(server.new_token()) >= 43 and server.new_token() != server.new_token()


def test_nobody_there():
    with serving(Toy()) as served:
        url = served.url
    pauses = []
    with pytest.raises(RecipeError, match=rf"no reward answers at {url} .*rewardtune serve"):
        client.RemoteReward(url, Key(TOKEN, "a test"), retries=2, sleep=pauses.append)
    assert len(pauses) == 2


class Breaking(server.RewardServer):
    """Closes the door on the next requests in `plan`."""

    plan: list[str]

    def answer(self, path, raw):
        kind = self.plan.pop(0) if self.plan else ""
        if kind == "drop":
            raise ConnectionError("as told")
        if kind == "fault":
            raise RuntimeError("as told")
        body, what = super().answer(path, raw)
        return (body[: len(body) // 2] if kind == "cut" else body), what


def test_dropped_connections_and_faults_are_tried_again_and_then_end_clearly():
    with serving(Toy(), cls=Breaking) as served:
        pauses = []
        line = load_remote(served, retries=3, pauses=pauses)
        served.plan = ["drop", "fault", "cut"]
        leaf = pictures().requires_grad_()
        score = line.score(leaf, PROMPTS)
        assert torch.equal(score.value, (leaf**2).mean((1, 2, 3))) and len(pauses) == 3
        assert pauses == sorted(pauses), "longer each time"
        served.plan = ["drop"] * 4
        with pytest.raises(DataError, match=rf"{served.url}: reward 'toy' is gone after 4 attempts: the connection"):
            score.value.sum().backward()
        served.plan = ["fault"] * 4
        with pytest.raises(DataError, match=r"RuntimeError: as told.*continues from its last checkpoint"):
            line.score(leaf, PROMPTS)


def test_another_reward_behind_the_url_is_noticed():
    with serving(Toy(), options={"dtype": "float32"}) as first:
        line = load_remote(first)
        port = first.server_address[1]
        leaf = pictures().requires_grad_()
        score = line.score(leaf, PROMPTS)
    with serving(Toy(), options={"dtype": "float32"}, port=port) as second:
        score.value.sum().backward()
        assert len(second.reward.seen) == 1, "the same one again is as good"
    with serving(Toy(), options={"dtype": "bfloat16"}, port=port) as other:
        with pytest.raises(RecipeError, match=r"another one was asked for.*Serve the reward of before"):
            line.score(leaf, PROMPTS)
        assert other.reward.seen == []


def test_a_retrained_checkpoint_in_the_same_place_is_another_reward(tmp_path):
    """The card and the options are the same; the bytes are not."""
    (tmp_path / "export/deep").mkdir(parents=True)
    weights = tmp_path / "export/deep/model.safetensors"
    weights.write_bytes(b"first")
    options = {"name": "toy", "checkpoint": str(tmp_path / "export"), "question": "x" * 5000, "dtype": "float32"}
    with serving(Toy(), options=options) as first:
        line = load_remote(first)
        port = first.server_address[1]
        identity = first.identity
    with serving(Toy(), options=options, port=port) as second:
        assert second.identity == identity == line.identity
        line.score(pictures(), PROMPTS)
    weights.write_bytes(b"again")
    with serving(Toy(), options=options, port=port), pytest.raises(RecipeError, match="another one was asked for"):
        line.score(pictures(), PROMPTS)
    weights.write_bytes(b"first")
    weights.rename(weights.with_name("other.safetensors"))
    assert wire.identity_of(first.card, options) != identity, "names count too"


def test_another_version_is_noticed(monkeypatch):
    with serving(Toy()) as served:
        line = load_remote(served)
        monkeypatch.setattr(wire, "PROTOCOL", 2)
        sent = wire.pack_request(pictures(), PROMPTS, identity=served.identity)
        monkeypatch.setattr(wire, "PROTOCOL", 1)
        status, body = _raw(served, "POST", "/score", sent)
        assert status == 409 and "speaks protocol 1" in body["error"]["message"]
        described = served.describe() | {"protocol": 2, "version": "9.0"}
        monkeypatch.setattr(served, "describe", lambda: described)
        with pytest.raises(RecipeError, match=r"speaks protocol 2 \(rewardtune 9.0\).*same version"):
            load_remote(served)
        monkeypatch.setattr(served, "describe", lambda: {"protocol": 1})
        with pytest.raises(RecipeError, match="is no reward's card"):
            load_remote(served)
        assert line.card.name == "toy"


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (lambda i, p: Score(i.mean()[None]), PluginError, r"returned \(1,\) values for 3 images"),
        (lambda i, p: Score(i.mean((1, 2, 3)) / 0 * 0), NonFiniteError, r"not finite for image\(s\) \[0, 1, 2\]"),
        (lambda i, p: _raise(DataError("the prompt carries no facts")), DataError, "carries no facts"),
        (lambda i, p: _raise(torch.OutOfMemoryError("tried 9 GiB")), OutOfMemoryError, "tried 9 GiB"),
    ],
    ids=["length", "nan", "refused", "memory"],
)
def test_what_the_reward_refuses_is_the_same_error_here(answer, error, said):
    with serving(Toy(answer)) as served:
        line = load_remote(served, retries=2)
        with pytest.raises(error, match=said) as raised:
            line.score(pictures(), PROMPTS)
        assert served.url in str(raised.value)
        assert len(served.reward.seen) == 1, "asked once: another attempt would say the same"


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda s: Score(s.value[:2]), DataError, r"values of shape \(2,\) for 3 images"),
        (lambda s: Score(s.value * float("nan")), NonFiniteError, "value that is not finite"),
        (lambda s: Score(s.value, torch.ones(3, 1, 2), torch.ones(3), ("a",)), DataError, "a distribution of shape"),
        (lambda s: Score(s.value, parts={"a": torch.ones(2)}), DataError, "the parts a are not one number"),
    ],
    ids=["length", "nan", "levels", "parts"],
)
def test_a_server_that_answers_nonsense_is_not_believed(monkeypatch, change, error, said):
    with serving(Toy()) as served:
        line = load_remote(served)
        honest = wire.pack_score
        monkeypatch.setattr(wire, "pack_score", lambda score, identity: honest(change(score), identity=identity))
        with pytest.raises(error, match=said) as raised:
            line.score(pictures(), PROMPTS)
        assert served.url in str(raised.value)


def test_a_gradient_of_another_shape_is_not_believed(monkeypatch):
    with serving(Toy()) as served:
        score = load_remote(served).score(pictures().requires_grad_(), PROMPTS)
        honest = wire.pack
        monkeypatch.setattr(wire, "pack", lambda t, d: honest({k: v[:1] for k, v in t.items()}, d))
        with pytest.raises((DataError, RecipeError)):
            score.value.sum().backward()


def test_a_gradient_that_is_not_finite_passes_as_in_one_process():
    """The loop skips the step and counts it, whoever computed it."""
    with serving(Toy(lambda i, p: Score(i.flatten(1).min(1).values.sqrt()))) as served:
        leaf = torch.zeros(2, 3, 4, 4, requires_grad=True)
        load_remote(served).score(leaf, ["a", "b"]).value.sum().backward()
    assert not bool(torch.isfinite(leaf.grad).all())


def test_limits_are_kept_and_named():
    limits = Limits(bytes=30_000, images=2, pixels=16 * 16)
    with serving(Toy(), limits=limits) as served:
        line = load_remote(served)
        for images, said in (
            (pictures(3, 4), r"3 images in a request, more than the 2 allowed here \(--max-images\)"),
            (pictures(1, 17), "images of 289 pixels, more than the 256 allowed"),
            (pictures(2, 64), r"a body of \d+ bytes, more than the 30000 allowed here \(--max-mib\)"),
        ):
            with pytest.raises(RecipeError, match=said) as raised:
                line.score(images, ["a"] * len(images))
            assert "train.batch_size" in str(raised.value)
        assert served.reward.seen == []
        assert line.score(pictures(2, 16), ["a", "b"]).value.shape == (2,)


def test_a_reward_without_gradient_has_none_here():
    from dataclasses import replace

    with serving(Toy(card=replace(CARD, differentiable=False))) as served:
        line = load_remote(served)
        assert not line.score(pictures().requires_grad_(), PROMPTS).value.requires_grad
        with pytest.raises(RecipeError, match="returns no gradient"):
            line.gradient(pictures(), PROMPTS, {"value": torch.ones(3)})
    with serving(Toy(lambda i, p: Score(i.detach().mean((1, 2, 3))))) as served:
        score = load_remote(served).score(pictures().requires_grad_(), PROMPTS)
        with pytest.raises(RecipeError, match="declared differentiable, and returned value without a graph"):
            score.value.sum().backward()


def _raw(served, method, path, body=None, *, token=TOKEN):
    host, port = served.server_address[:2]
    line = http.client.HTTPConnection(host, port, timeout=10)
    line.request(method, path, body=body, headers={"Authorization": f"Bearer {token}"} if token else {})
    answer = line.getresponse()
    return answer.status, json.loads(answer.read())


GOOD = wire.pack_request(pictures(2, 4), ["a", "b"], identity="")


def malformed():
    images = pictures(2, 4)
    document = {"protocol": 1, "prompts": ["a", "b"]}
    yield "nothing", b""
    yield "prose", b"hello, is this a reward?"
    yield "a pickle", b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    yield "cut off", GOOD[:-10]
    yield "a header of terabytes", (2**40).to_bytes(8, "little") + b"{}"
    yield "no images", wire.pack({"x": images}, document)
    yield "bytes for pixels", wire.pack({"images": (images * 255).byte()}, document)
    yield "one picture", wire.pack({"images": images[0]}, document)
    yield "four channels", wire.pack({"images": torch.rand(2, 4, 4, 4)}, document)
    yield "a prompt short", wire.pack({"images": images}, document | {"prompts": ["a"]})
    yield "a number for a prompt", wire.pack({"images": images}, document | {"prompts": ["a", 1]})
    yield "metadata of one", wire.pack({"images": images}, document | {"metadata": [{}]})


@pytest.mark.parametrize(("name", "body"), list(malformed()), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_bodies_are_refused_with_a_reason(name, body):
    with serving(Toy()) as served:
        status, answer = _raw(served, "POST", "/score", body)
        assert status == 400 and answer["error"]["type"] == "malformed" and answer["error"]["message"]
        assert served.reward.seen == []
        assert _raw(served, "POST", "/elsewhere", GOOD)[0] == 404


def test_gradients_need_weights_that_fit():
    with serving(Toy()) as served:
        for weights, said in (
            (None, "a gradient needs weights"),
            ({"value": torch.ones(3)}, r"weights of 'value' with shape \(3,\)"),
            ({"distribution": torch.ones(2)}, "has the outputs {'value': (2,)}"),
        ):
            body = wire.pack_request(pictures(2, 4), ["a", "b"], identity=served.identity, weights=weights)
            status, answer = _raw(served, "POST", "/gradient", body)
            assert status == 400 and said.replace("\\", "") in answer["error"]["message"]


def test_one_request_computes_at_a_time():
    inside, most = [], []

    def slow(images, prompts):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.03)
        inside.pop()
        return Score(images.mean((1, 2, 3)))

    with serving(Toy(slow)) as served:
        lines = [load_remote(served) for _ in range(6)]
        threads = [threading.Thread(target=line.score, args=(pictures(1, 4), ["a"])) for line in lines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1] * 6


def test_a_request_under_way_ends_before_the_server_does():
    started, found = threading.Event(), []

    def slow(images, prompts):
        started.set()
        time.sleep(0.3)
        return Score(images.mean((1, 2, 3)))

    with serving(Toy(slow)) as served:
        line = load_remote(served)
        thread = threading.Thread(target=lambda: found.append(line.score(pictures(1, 4), ["a"])))
        thread.start()
        assert started.wait(5) and served.finish(5)
        thread.join()
    assert len(found) == 1
