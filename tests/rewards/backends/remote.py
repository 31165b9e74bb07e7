"""`remote`: the pocket world's student behind an address, served from a thread of this process."""

import threading

from backend import Backend

TOKEN = "a token of a test"


def make(folder):
    from rewardtune import load_reward
    from rewardtune.serving.server import Limits, RewardServer

    server = RewardServer(
        load_reward("zreward"), options={}, token=TOKEN, port=0, limits=Limits(), log=lambda line: None
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "token").write_text(TOKEN)
    return {"url": server.url, "token_file": str(folder / "token")}


BACKEND = Backend("remote", make, logged="zreward")
