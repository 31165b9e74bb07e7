"""`http-judge`: a server that speaks OpenAI's protocol, and judges by brightness and by the length of the question."""

import threading

import torch
from backend import Backend


def make(folder):
    from judge_stub import Stub, shares

    def say(body, text, pixels):
        level = (len(text) % 5) + 4 * float(pixels.mean())
        return shares(torch.softmax(-(torch.arange(9.0) - level).square(), 0).tolist())

    server = Stub()
    server.say = say
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {"url": server.url, "served_model": "judge"}


BACKEND = Backend("http-judge", make)
