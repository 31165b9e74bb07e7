"""A server that speaks vLLM's protocol for run-time adapters and token ids, with a tiny reasoner for an engine.

It takes nothing that is not in vLLM 0.33's docs/features/lora.md and docs/serving/online_serving/token_in_token_out.md,
and samples what `Reasoner.sample` would with the same key, under the adapter that the request names.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from rewardtune.data.images import to_tensor
from rewardtune.diffusion import lora
from rewardtune.randomness import key
from rewardtune.scorer.model import load_scorer
from rewardtune.scorer.reasoning import Question, Trace, load_reasoner

SAMPLING = {"temperature", "max_tokens", "stop_token_ids", "ignore_eos", "logit_bias", "detokenize", "logprobs", "seed",
            "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}  # fmt: skip
Fault = Callable[["Handler", Any], Any]
"""Changes the good answer, or answers by itself and returns None."""


class VllmStub(ThreadingHTTPServer):
    """base: a reasoner's folder. prompts, keys: what may be asked, since ids and seeds alone come over the line.

    plan: faults of the first requests of a kind (`load`, `unload`, `generate`), as they arrive; None is no fault.
    """

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, base: Path, *, prompts: Sequence[str], keys: Sequence[tuple[Any, ...]], rank: int = 4) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reasoner = load_reasoner(load_scorer(base))
        self.prompts, self.rank = prompts, rank
        self.keys = {key(*one) % 2**31: one for one in keys}
        self.adapters: dict[str, dict[str, torch.Tensor]] = {}
        self.order: list[tuple[str, str]] = []
        self.asked: list[dict[str, Any]] = []
        self.plan: dict[str, list[Fault | None]] = {"load": [], "unload": [], "generate": []}
        self.always: dict[str, Fault] = {}
        self.unmet: list[str] = []
        self.lock = threading.Lock()
        self.let_go = threading.Event()
        self.attached = False

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests

    def load(self, name: str, path: str) -> None:
        """As vLLM: names of layers come from the file, rank and strength from adapter_config.json."""
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and not config["use_rslora"]
        if config["r"] > self.rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.rank}.")
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        model = self.reasoner.scorer.model
        if not self.attached:
            lora.attach(
                {"scorer": model}, rank=config["r"], alpha=config["lora_alpha"],
                targets={"scorer": sorted(config["target_modules"])},
            )  # fmt: skip
            self.attached = True
        mine = {f"base_model.model.{n.replace('.default.', '.')}" for n, _ in self.trained()}
        assert set(tensors) == mine, set(tensors) ^ mine
        self.adapters[name] = tensors

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.reasoner.scorer.model.named_parameters() if p.requires_grad]

    def write(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling, reasoner = body["sampling_params"], self.reasoner
        scorer = reasoner.scorer
        assert set(body) == {"model", "token_ids", "content_parts", "sampling_params", "return_token_ids"}, set(body)
        assert set(sampling) <= SAMPLING and sampling["ignore_eos"] is True and sampling["detokenize"] is False
        assert sampling["stop_token_ids"] == [reasoner.reading.stop]
        assert sampling["logit_bias"] == {str(token): -100.0 for token in reasoner.unsayable}
        (part,) = body["content_parts"]
        assert set(part) == {"type", "url"} and part["type"] == "image_url"
        head, _, data = part["url"].partition(",")
        assert head == "data:image/png;base64"
        picture = to_tensor([Image.open(io.BytesIO(base64.b64decode(data, validate=True)))])[0]
        cut = scorer.geometry
        count = cut.tokens(*cut.fit(*picture.shape[-2:]))
        (place,) = [k for k, token in enumerate(body["token_ids"]) if token == scorer.image_token]
        prompt = [*body["token_ids"][:place], *[scorer.image_token] * count, *body["token_ids"][place + 1 :]]
        (question,) = [
            Question(0, text, d) for text in self.prompts for d, frame in enumerate(reasoner.reading.frames)
            if scorer.tokens(frame, text, count) == prompt
        ]  # fmt: skip
        weights = self.adapters[body["model"]]
        with torch.no_grad():
            for name, parameter in self.trained():
                parameter.copy_(weights[f"base_model.model.{name.replace('.default.', '.')}"])
            (trace,) = reasoner.sample(
                [picture], [question], [self.keys[sampling["seed"]]], temperature=sampling["temperature"],
                max_tokens=sampling["max_tokens"],
            )  # fmt: skip
            read = reasoner.read([picture], [question], [trace], tokens=True)
        return self.answer(prompt, trace, read.log_probs[0].tolist() if "logprobs" in sampling else None)

    def answer(self, prompt: list[int], trace: Trace, values: list[float] | None) -> dict[str, Any]:
        ids = [*trace.ids, *[self.reasoner.reading.stop] * trace.ended]
        content = None
        if values is not None:
            content = {"content": [{"token_id": t, "logprob": v, "rank": 1, "top_logprobs": []}
                                   for t, v in zip(ids, values, strict=False)]}  # fmt: skip
        return {
            "request_id": "generate-tokens-1", "model": None, "created": 1, "output_mode": "tokens",
            "choices": [{"index": 0, "finish_reason": "stop" if trace.ended else "length", "token_ids": ids,
                         "stop_reason": self.reasoner.reading.stop if trace.ended else None, "logprobs": content}],
            "prompt_token_ids": prompt, "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: VllmStub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kinds = {"/v1/load_lora_adapter": "load", "/v1/unload_lora_adapter": "unload",
                 "/inference/v1/generate": "generate"}  # fmt: skip
        if self.path not in kinds:
            return self.send(404, {"detail": "Not Found"})
        kind, stub = kinds[self.path], self.server
        with stub.lock:
            planned = stub.plan[kind]
            fault = planned.pop(0) if planned else stub.always.get(kind)
            try:
                status, good = getattr(self, kind)(body)
            except ValueError as error:
                status, good = 500, refusal(500, str(error))
            except (AssertionError, KeyError, TypeError) as error:
                stub.unmet.append(repr(error))
                status, good = 400, refusal(400, repr(error))
        if fault is not None and status == 200:
            good = fault(self, good)
        if good is not None:
            self.send(status, good)

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert set(body) == {"lora_name", "lora_path"}
        name = body["lora_name"]
        if name in self.server.adapters:
            return 400, refusal(400, f"The lora adapter '{name}' has already been loaded. If you want to load")
        self.server.load(name, body["lora_path"])
        self.server.order.append(("load", name))
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert set(body) == {"lora_name"}
        name = body["lora_name"]
        if self.server.adapters.pop(name, None) is None:
            return 404, refusal(404, f"The lora adapter '{name}' cannot be found.")
        self.server.order.append(("unload", name))
        return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in self.server.adapters:
            return 404, refusal(404, f"The model `{body['model']}` does not exist. Valid aliases: base.")
        self.server.asked.append(body)
        return 200, self.server.write(body)

    def send(self, status: int, document: Any) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def refusal(code: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "Error", "param": None, "code": code}}


def status(code: int, message: str = "") -> Fault:
    return lambda handler, good: handler.send(code, refusal(code, message or f"fault {code}"))


def silent(handler: Handler, good: Any) -> None:
    handler.server.let_go.wait(20)


def changed(**fields: Any) -> Fault:
    """Fields of the answer, or of its choice, replaced; None leaves a field of the answer out."""

    def fault(handler: Handler, good: dict[str, Any]) -> dict[str, Any]:
        (choice,) = good["choices"]
        choice = {**choice, **{name: value for name, value in fields.items() if name in choice}}
        whole = {**good, **{name: value for name, value in fields.items() if name in good}, "choices": [choice]}
        return {name: value for name, value in whole.items() if value is not None}

    return fault
