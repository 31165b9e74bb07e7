"""An OpenAI-compatible server with a picture judge behind it: it takes OpenAI's own fields and nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from rewardtune.data.images import to_tensor

FIELDS = {"model", "messages", "temperature", "seed", "max_tokens", "logprobs", "top_logprobs"}


class Stub(ThreadingHTTPServer):
    """say: (body, text of the question, pixels) -> the first choice of the answer, or (status, document)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.say, self.lock = [], None, threading.Lock()
        self.most, self.inside = 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": "judge"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and set(body) <= FIELDS | {"chat_template_kwargs"}, set(body)
        *_, user = body["messages"]
        (picture,) = [p["image_url"]["url"] for p in user["content"] if p["type"] == "image_url"]
        assert picture.startswith("data:image/png;base64,")
        pixels = to_tensor([Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))])[0]
        text = "".join(p.get("text", "<image>") for p in user["content"])
        with self.server.lock:
            self.server.asked.append((body, text))
            self.server.inside += 1
            self.server.most = max(self.server.most, self.server.inside)
        answer = self.server.say(body, text, pixels)
        with self.server.lock:
            self.server.inside -= 1
        if isinstance(answer, tuple):
            self.reply(*answer)
        else:
            self.reply(200, {"choices": [answer]})

    def reply(self, status, document):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def said(text, finish="stop"):
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish}


def shares(values, *, space=False, mass=0.98):
    """Log-probabilities as OpenAI lists them; what the levels do not hold lies with prose."""
    listed = [{"token": str(k + 1), "logprob": math.log(mass * v)} for k, v in enumerate(values)]
    listed.append({"token": "The", "logprob": math.log(1 - mass)})
    places = [{**listed[0], "top_logprobs": listed}]
    if space:
        places.insert(0, {"token": " ", "logprob": -0.1, "top_logprobs": [{"token": " ", "logprob": -0.1}]})
    return {"message": {"content": "1"}, "logprobs": {"content": places}, "finish_reason": "length"}
