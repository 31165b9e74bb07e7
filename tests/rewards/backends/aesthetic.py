"""`aesthetic` on a small CLIPModel and a head of its authors' form."""

import tiny_clip
import torch
from backend import Backend
from rewardtune.rewards.aesthetic import make_head


def make(folder):
    head = make_head("2", 24)
    tiny_clip.seed(head)
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return {"model": tiny_clip.save(folder), "head": str(folder / "sac+logos+ava1-l14-linearMSE.pth")}


BACKEND = Backend("aesthetic", make)
