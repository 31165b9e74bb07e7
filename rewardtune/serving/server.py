"""A loaded reward behind HTTP: its scores, and the gradient at the images for given weights of its outputs.

`rewardtune serve` runs it, `client.py` asks it, docs/serving.md has the protocol. Stateless: a gradient is computed
from the images that came with the request. One thread computes, so requests wait for each other and a device never
holds two graphs; the others only read and write sockets.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from rewardtune import __version__
from rewardtune.errors import OutOfMemoryError, RecipeError, RewardTuneError
from rewardtune.plugins import Reward
from rewardtune.scoring.checked import check_score
from rewardtune.scoring.score import card_document
from rewardtune.serving import wire
from rewardtune.types import Prompt

SHORTEST_TOKEN = 16
"""Characters. Ours, like the next two."""
AT_ONCE = 4
"""Requests whose bodies are in memory at the same time; others wait before theirs is read."""
SILENCE = 60.0
"""Seconds that a client may say nothing."""


@dataclass(frozen=True)
class Limits:
    """Most that a request may hold; defaults are ours. bytes: of its body. pixels: of one image."""

    bytes: int = 2**30
    images: int = 64
    pixels: int = 2048 * 2048


class _No(Exception):
    """A request that is answered with an error. kind: what the client may act on."""

    def __init__(self, status: int, kind: str, said: str) -> None:
        super().__init__(said)
        self.status, self.kind, self.said = status, kind, said


class RewardServer(ThreadingHTTPServer):
    """Serves until `shutdown`. options: those the reward was loaded with; they are part of its identity.

    port: 0 takes a free one. log: called with a line for each request. Raises RecipeError for a token that is too short
    and an address that cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, reward: Reward, *, options: Mapping[str, Any], token: str, host: str = "127.0.0.1", port: int = 0,
        limits: Limits | None = None, device: str = "cpu", log: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        if len(token) < SHORTEST_TOKEN:
            raise RecipeError(f"the token is shorter than {SHORTEST_TOKEN} characters; take a longer one, or none.")
        self.reward, self.token, self.limits = reward, token, limits or Limits()
        self.device, self.log = torch.device(device), log
        self.card = card_document(reward.card)
        self.identity = wire.identity_of(self.card, options)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RecipeError(
                f"{host}:{port} cannot be listened on ({error}). Give another --port, or --host a name or number of "
                "this machine."
            ) from None
        # another thread would compute with another number of threads, and round differently
        self.computing = ThreadPoolExecutor(1, "reward", torch.set_num_threads, (torch.get_num_threads(),))
        self.slots = threading.BoundedSemaphore(AT_ONCE)
        self.quiet = threading.Condition()
        self.under_way = 0

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = f"[{host!s}]" if self.address_family == socket.AF_INET6 else str(host)
        return f"http://{name}:{port}"

    def finish(self, seconds: float) -> bool:
        """Take no more requests, and wait for those under way; whether all came to an end."""
        self.shutdown()
        with self.quiet:
            done = self.quiet.wait_for(lambda: self.under_way == 0, seconds)
        self.server_close()
        self.computing.shutdown(wait=False, cancel_futures=True)
        return done

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log(f"{client_address[0]}: the connection broke ({sys.exc_info()[1]})")

    # ------------------------------------------------------------------------------------------------------- answers

    def describe(self) -> dict[str, Any]:
        """The answer to GET /card."""
        return {
            "protocol": wire.PROTOCOL,
            "version": __version__,
            "identity": self.identity,
            "card": self.card,
            "limits": asdict(self.limits),
        }

    def answer(self, path: str, raw: bytes) -> tuple[bytes, str]:
        """The body that answers a POST, and a few words for the log. Raises _No."""
        try:
            message = wire.unpack(raw)
            self._check_partner(message.document)
            images, prompts, weights = wire.request_parts(message)
        except wire.Malformed as error:
            raise _No(400, "malformed", f"{error}.") from None
        count, _, height, width = images.shape
        self._check_size(count, height * width)
        if path == "/gradient" and not weights:
            raise _No(400, "malformed", f"a gradient needs weights of outputs, such as {wire.WEIGHTS}value.")
        asked = time.monotonic()
        started: list[float] = []

        def compute() -> bytes:
            started.append(time.monotonic())
            return self._score(images, prompts) if path == "/score" else self._gradient(images, prompts, weights)

        found = self.computing.submit(compute).result()
        what = f"{count} x {height} x {width} {str(images.dtype).removeprefix('torch.')}"
        return found, f"{what}, waited {started[0] - asked:.2f} s, computed {time.monotonic() - started[0]:.2f} s"

    def _score(self, images: Tensor, prompts: list[Prompt]) -> bytes:
        with torch.no_grad():
            score = _asked(lambda: self.reward.score(images.to(self.device), prompts))
        _asked(lambda: check_score(self.reward.card.name, score, len(images)))
        return wire.pack_score(score, identity=self.identity)

    def _gradient(self, images: Tensor, prompts: list[Prompt], weights: Mapping[str, Tensor]) -> bytes:
        name = self.reward.card.name
        if not self.reward.card.differentiable:
            raise _No(422, "RecipeError", f"reward {name!r} returns no gradient.")
        with torch.enable_grad():
            leaf = images.to(self.device).requires_grad_(True)
            score = _asked(lambda: self.reward.score(leaf, prompts))
            known = wire.outputs(score)
            for output, weight in weights.items():
                if output not in known or weight.shape != known[output].shape:
                    expected = {one: tuple(tensor.shape) for one, tensor in known.items()}
                    raise _No(400, "malformed", f"weights of {output!r} with shape {tuple(weight.shape)}; reward "
                                                f"{name!r} has the outputs {expected}.")  # fmt: skip
            # an output that does not depend on the pixels adds nothing, as in one process
            pairs = [(known[n], w.to(known[n])) for n, w in weights.items() if known[n].requires_grad]
            if not pairs:
                raise _No(422, "RecipeError", f"reward {name!r} is declared differentiable, and returned "
                                              f"{', '.join(weights)} without a graph.")  # fmt: skip
            targets, factors = zip(*pairs, strict=True)
            (gradient,) = _asked(lambda: torch.autograd.grad(targets, leaf, factors, allow_unused=True))
        if gradient is None:
            raise _No(422, "RecipeError", f"no gradient of reward {name!r} reaches the pixels.")
        return wire.pack({"gradient": gradient}, {"protocol": wire.PROTOCOL, "identity": self.identity})

    def _check_partner(self, document: Mapping[str, Any]) -> None:
        spoken = document.get("protocol")
        if spoken != wire.PROTOCOL:
            raise _No(409, "protocol", f"this server speaks protocol {wire.PROTOCOL} (rewardtune {__version__}), the "
                                       f"request is of protocol {spoken!r}.")  # fmt: skip
        wanted = document.get("identity")
        if wanted is not None and wanted != self.identity:
            raise _No(409, "identity", f"reward {self.reward.card.name!r} is served here (identity {self.identity}), "
                                       f"and another one was asked for ({wanted}).")  # fmt: skip

    def _check_size(self, count: int, pixels: int) -> None:
        if count > self.limits.images:
            raise _No(413, "size", f"{count} images in a request, more than the {self.limits.images} allowed here "
                                   "(--max-images).")  # fmt: skip
        if pixels > self.limits.pixels:
            raise _No(413, "size", f"images of {pixels} pixels, more than the {self.limits.pixels} allowed here "
                                   "(--max-pixels).")  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = SILENCE
    server_version, sys_version = "rewardtune", ""

    def log_message(self, *args: Any) -> None:
        pass  # `_reply` writes the one line of a request

    def do_GET(self) -> None:
        self._handle(self._get)

    def do_POST(self) -> None:
        self._handle(self._post)

    def _handle(self, work: Callable[[], tuple[bytes, str, str]]) -> None:
        with self.server.quiet:
            self.server.under_way += 1
        try:
            self._reply(200, *work())
        except _No as no:
            self._reply_error(no.status, no.kind, no.said)
        except (TimeoutError, ConnectionError) as error:
            self.close_connection = True
            self.server.log(f"{self.client_address[0]} {self.command} {self.path[:80]}: gone ({error})")
        except Exception as error:  # a fault of reward or server must not end the service
            traceback.print_exc()
            self._reply_error(500, "fault", f"{type(error).__name__}: {error} (the server's log has the place).")
        finally:
            with self.server.quiet:
                self.server.under_way -= 1
                self.server.quiet.notify_all()

    def _get(self) -> tuple[bytes, str, str]:
        if self.path == "/health":
            return _json({"status": "ok", "protocol": wire.PROTOCOL}), "application/json", ""
        self._check_token()
        if self.path != "/card":
            raise _No(404, "address", "there are GET /health and /card, POST /score and /gradient.")
        return _json(self.server.describe()), "application/json", ""

    def _post(self) -> tuple[bytes, str, str]:
        size = self._announced()
        try:
            self._check_token()
            if self.path not in ("/score", "/gradient"):
                raise _No(404, "address", "there are GET /health and /card, POST /score and /gradient.")
            if size > self.server.limits.bytes:
                raise _No(413, "size", f"a body of {size} bytes, more than the {self.server.limits.bytes} allowed here "
                                       "(--max-mib).")  # fmt: skip
        except _No:
            self._drain(size)
            raise
        with self.server.slots:
            raw = self.rfile.read(size)
            if len(raw) < size:
                raise ConnectionError(f"{len(raw)} of {size} bytes came")
            found, what = self.server.answer(self.path, raw)
        return found, "application/octet-stream", what

    def _announced(self) -> int:
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit() or len(size) > 15:
            raise _No(411, "malformed", "the request does not say how long its body is (Content-Length).")
        return int(size)

    def _check_token(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise _No(401, "token", "the token is wrong or missing (Authorization: Bearer TOKEN).")

    def _drain(self, size: int) -> None:
        """Read what a client sends all the same: it would not see the answer before it has sent everything."""
        left = min(size, self.server.limits.bytes)
        while left > 0 and (part := self.rfile.read(min(left, 2**16))):
            left -= len(part)

    def _reply_error(self, status: int, kind: str, said: str) -> None:
        text = " ".join(said.split())
        self._reply(status, _json({"error": {"type": kind, "message": text}}), "application/json", text)

    def _reply(self, status: int, body: bytes, kind: str, what: str) -> None:
        path = self.path[:80]
        # looked at every few seconds by whoever watches over the server
        if path != "/health":
            self.server.log(f"{self.client_address[0]} {self.command} {path} {status}{f': {what}' if what else ''}")
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (OSError, ValueError) as error:
            self.close_connection = True
            self.server.log(f"{self.client_address[0]} did not wait for the answer ({error})")


def new_token() -> str:
    """Enough for nobody to guess: 256 bits."""
    return secrets.token_urlsafe(32)


def _asked(work: Callable[[], Any]) -> Any:
    """What a reward returns. What it refuses becomes 422 with the class of its error, which the client raises again."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        first = str(error).splitlines()[0]
        raise _No(422, OutOfMemoryError.__name__, f"out of memory on the reward's device ({first}).") from None
    except RewardTuneError as error:
        raise _No(422, type(error).__name__, str(error)) from None


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document) + "\n").encode()
