"""Many requests at once to one HTTP server: time limits, bounded retries, and errors that say what to do.

Knows nothing of models. `scorer/server.py` asks a teacher for judgements through it, `scorer/remote_rollouts.py` for
traces, `client.py` a reward for scores and gradients.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import math
import os
import queue
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from rewardtune.errors import DataError, RecipeError
from rewardtune.randomness import choice

T = TypeVar("T")
Row = TypeVar("Row")

FIRST_PAUSE = 1.0
"""Seconds, as the next two. Ours, like the last one."""
LONGEST_PAUSE = 30.0
LONGEST_RETRY_AFTER = 60.0
LARGEST_ANSWER = 16 * 2**20
"""Bytes; a trace of 100,000 tokens is below one megabyte, and below ten with ids and log-probabilities."""
MESSAGE = 600
"""Characters kept of what a server says."""
ADDRESS = "give http://host:port/v1 or https://host/v1, without user or password"
"""What `is_address` asks for."""
NO_KEY = (
    "It is named by key_variable: put the server's key into it, or leave key_variable out for a server without keys."
)


@dataclass(frozen=True)
class Unscorable:
    """No answer, and why: to be dropped and counted, never to become a number."""

    reason: str


class Fault(Exception):
    """An attempt failed; another may not."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Dropped(Exception):
    """The row is unscorable, and another attempt would say the same."""


class Refused(Exception):
    """The server understood and said no (4xx but 408 and 429): a mistake of the recipe, which the caller explains.

    kind: the `type` of an error that has one, else empty.
    """

    def __init__(self, status: int, said: str, kind: str = "") -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said, self.kind = status, said, kind


@dataclass(frozen=True)
class Key:
    """What a server wants to see before it answers, and where it was read."""

    secret: str = field(repr=False)
    source: str


def key_from_environment(variable: str | None, *, remedy: str = NO_KEY) -> Key | None:
    """The key in an environment variable, None where none is named.

    Raises RecipeError, with the remedy, when the variable holds no key.
    """
    if variable is None:
        return None
    secret = os.environ.get(variable, "").strip()
    if not _is_key(secret):
        raise RecipeError(f"the environment variable {variable} is {'no key' if secret else 'not set'}. {remedy}")
    return Key(secret, f"the environment variable {variable}")


def key_from_file(file: str | Path) -> Key:
    """The key that is a file's only text. Raises RecipeError when it cannot be read or is none."""
    path = Path(file).expanduser()
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the key cannot be read from it ({error}).") from None
    if not _is_key(secret):
        raise RecipeError(f"{path}: the file must hold one key and nothing else.")
    return Key(secret, f"the file {path}")


class Connection:
    """What the threads of one call share.

    base: what addresses start with. key: None for a server without one. timeout: seconds for one request. retries:
    further attempts after a failed one. sleep: waits the given seconds.
    """

    def __init__(
        self, base: str, *, key: Key | None, timeout: float, retries: int, sleep: Callable[[float], None]
    ) -> None:
        self.base, self.key = base, key
        self.timeout, self.retries, self.sleep = timeout, retries, sleep
        self.stopped = threading.Event()
        self.headers = {"Authorization": f"Bearer {key.secret}"} if key else {}
        # no proxy stands before this machine's own servers, whatever http_proxy says: it would see the key
        direct = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(base).hostname or "") else []
        self.opener = urllib.request.build_opener(_NoRedirect, *direct)

    def ask(
        self, url: str, body: dict[str, Any] | bytes | None, read: Callable[[bytes], T], *, seed: int, step: str,
        largest: int = LARGEST_ANSWER,
    ) -> T:  # fmt: skip
        """What `read` makes of the answer; a Fault that it raises is tried again.

        body: sent as JSON, or as it is; None asks without one (GET). seed, step: name the pauses' jitter. largest: most
        bytes of an answer. Raises Dropped after the last attempt, Refused, and RecipeError for what no request to this
        server survives.
        """
        data, attempt = json.dumps(body).encode() if isinstance(body, dict) else body, 0
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        while True:
            if self.stopped.is_set():
                raise Dropped("the call was given up")
            try:
                return read(self._post(url, data, kind, largest))
            except Fault as fault:
                if attempt == self.retries:
                    raise Dropped(str(fault)) from None
                jitter = 0.5 + choice(seed, f"server-pause/{step}", attempt).random()
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * jitter
                self.sleep(max(pause, min(fault.retry_after, LONGEST_RETRY_AFTER)))
            attempt += 1

    def models(self) -> list[str] | None:
        """Names that the server says it serves; None where it does not say."""
        try:
            found = json.loads(self._send(f"{self.base}/models", None, "application/json", LARGEST_ANSWER))
            return [str(model["id"]) for model in found["data"]]
        except (Fault, OSError, http.client.HTTPException, ValueError, TypeError, KeyError):
            return None

    def no_access(self, refused: Refused) -> RecipeError:
        """The error for a refusal with 401 or 403."""
        hint = (
            f"The key was read from {self.key.source}; put a valid one there."
            if self.key
            else "Put the key into an environment variable and give the variable's name as key_variable."
        )
        return RecipeError(f"{self.base} refuses access ({refused}). {hint}")

    def _post(self, url: str, data: bytes | None, kind: str, largest: int) -> bytes:
        try:
            return self._send(url, data, kind, largest)
        except urllib.error.HTTPError as error:
            self._refused(error)
        except ssl.SSLCertVerificationError as error:
            raise RecipeError(
                f"{self.base}: the server's certificate is not trusted ({error.verify_message}). Install the "
                "authority that signed it, or name its file in SSL_CERT_FILE."
            ) from None
        except TimeoutError:
            raise Fault(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Fault(f"the connection failed ({str(error) or type(error).__name__})") from None

    def _send(self, url: str, data: bytes | None, kind: str, largest: int) -> bytes:
        """The body of the answer. The time limit covers all of it: a server may also send it by drops."""
        end = time.monotonic() + self.timeout
        request = urllib.request.Request(url, data=data, headers={"Content-Type": kind, **self.headers})
        try:
            with self.opener.open(request, timeout=self.timeout) as answer:
                parts, size = [], 0
                while part := answer.read1(2**16):
                    parts.append(part)
                    size += len(part)
                    if size > largest:
                        raise Fault(f"the answer is longer than {largest} bytes")
                    if time.monotonic() > end:
                        raise TimeoutError
                return b"".join(parts)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            # urllib wraps what happens before the answer's first line, and only that
            raise error.reason if isinstance(error.reason, OSError) else error from None

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        with error:
            said, kind = _said(error)
        status = error.code
        if status in (408, 429) or status >= 500:
            raise Fault(f"the server answered {status}: {said}", _retry_after(error.headers.get("Retry-After")))
        if 300 <= status < 400:
            raise RecipeError(
                f"{self.base} redirects to {error.headers.get('Location')}; give the address itself as url."
            )
        raise Refused(status, said, kind)


def ask_each(
    connection: Connection,
    rows: Iterable[Row],
    ask: Callable[[Row], T | Unscorable],
    *,
    total: int,
    concurrency: int,
    share: float,
    noun: str,
    hint: str,
) -> Iterator[tuple[int, T | Unscorable]]:
    """The answers to `total` rows from `concurrency` threads, each with its row's place, in the order in which they
    come. Rows are taken only a little ahead.

    share: most of the rows that may be lost; as soon as more are, DataError says why, with `noun` and `hint`. What
    `ask` raises ends the call.
    """
    answered = 0
    reasons: Counter[str] = Counter()
    todo: queue.SimpleQueue[tuple[int, Row] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | Unscorable | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        while (item := todo.get()) is not None and not connection.stopped.is_set():
            place, row = item
            try:
                done.put((place, ask(row)))
            except BaseException as error:  # `take` raises it again; nobody is to ask on, or to overtake it
                done.put((place, error))
                connection.stopped.set()

    def take() -> tuple[int, T | Unscorable]:
        nonlocal answered
        place, answer = done.get()
        if isinstance(answer, BaseException):
            raise answer
        answered += 1
        if isinstance(answer, Unscorable):
            reasons[answer.reason] += 1
            if reasons.total() > share * total:
                commonest = "; ".join(f"{reason} ({count} times)" for reason, count in reasons.most_common(3))
                raise DataError(
                    f"{connection.base}: {reasons.total()} of the first {answered} {noun} ({total} were asked for) "
                    f"are unscorable, more than the {share:.0%} allowed: {commonest}. {hint}"
                )
        return place, answer

    threads, waiting = min(concurrency, total), 0
    for _ in range(threads):
        # daemons, so that an interrupted program need not wait for a trace that may take minutes
        threading.Thread(target=work, daemon=True).start()
    try:
        for item in enumerate(rows):
            if waiting == 2 * threads:
                yield take()
                waiting -= 1
            todo.put(item)
            waiting += 1
        for _ in range(waiting):
            yield take()
    finally:
        connection.stopped.set()
        for _ in range(threads):
            todo.put(None)


def in_order(answers: Iterable[tuple[int, T]]) -> list[T]:
    """What `ask_each` and its like give, in the order of the places: all of them, from 0."""
    found = dict(answers)
    return [found[place] for place in range(len(found))]


def base(url: str) -> str:
    """The address of an OpenAI-compatible server with one `/v1` at its end."""
    start = url.rstrip("/").removesuffix("/chat/completions")
    return start if start.endswith("/v1") else f"{start}/v1"


def is_address(url: str) -> bool:
    """Whether a url can be asked: http or https, a host, no password, nothing behind the path."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # only here are other ports than numbers found out
    except ValueError:
        return False
    # a password in a url would end up in logs
    whole = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    return whole and not (parts.query or parts.fragment) and url.isascii() and not any(c.isspace() for c in url)


def is_loopback(host: str) -> bool:
    """Whether a name or number is this machine, seen from itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def json_object(raw: bytes) -> dict[str, Any]:
    """The object of an answer. Raises Fault where there is none."""
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        raise Fault("the answer is not JSON, or cut off") from None
    if not isinstance(answer, dict):
        raise Fault("the answer is not a JSON object")
    return answer


def first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The first of the answer's choices. Raises Fault where there is none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Fault("the answer has no choices")
    return choices[0]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        # the key would go along, to wherever the answer says
        return None


def _said(error: IO[bytes]) -> tuple[str, str]:
    """The server's message and its type: vLLM's, OpenAI's and our `error`, older vLLM's `message`, FastAPI's
    `detail`."""
    try:
        text = error.read(2**16).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return "no message", ""
    kind = ""
    try:
        document = json.loads(text)
        inner = document.get("error", document)
        text, kind = str(inner.get("message") or inner.get("detail") or text), str(inner.get("type") or "")
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:MESSAGE] or "no message", kind


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which may also be a date; 0 when there is none or it is neither."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _is_key(secret: str) -> bool:
    # what is not printable ASCII cannot stand in a header, and http.client's message would show the key
    return bool(secret) and secret.isascii() and secret.isprintable()
