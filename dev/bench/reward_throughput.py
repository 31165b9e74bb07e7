"""Pictures a second of `clipscore` and `imagereward` on a CPU, against torchmetrics' CLIPScore and imscore's BLIP.

    python -m venv build/reference
    build/reference/bin/pip install torch==2.13.0 torchvision 'transformers<5' torchmetrics==1.9.0 imscore==0.0.11 timm
    python dev/bench/reward_throughput.py --reference build/reference/bin/python

transformers 4, because torchmetrics 1.9.0 fails with 5, whose `get_image_features` returns no tensor. Each reward has
its published size (CLIP ViT-L/14, 428 M weights; BLIP with ViT-L/16, 447 M) and random weights, which the reference's
own classes draw and write, and which our side loads as if they were the published file. Both get the same pictures,
prompts and threads.

Two processes that wait for each other: one works while the other sleeps, and they swap places in every repeat. Timed is
from pictures in memory to numbers: resizing, tokens, both towers. torchmetrics gets bytes, as it asks for; the others
floats. Prompts are new in each repeat; then both sides see the same ones again, whose features clipscore has kept.
Writes reward_throughput.json beside this file.

Where torch is a CPU build, torchvision does not load. imscore needs its `transforms` and timm's `PatchEmbed`: Python
files without compiled parts, which can be put on the reference's path alone. torchmetrics does without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SIDE = 512
"""Pixels of a picture."""
WARM = 1
KINDS = {"clipscore": "torchmetrics CLIPScore", "imagereward": "imscore ImageReward"}
SUBJECTS = ("a red fox", "two cats", "an old lighthouse", "a bowl of ripe oranges", "three wooden boats")
PLACES = ("in deep snow", "on a kitchen table", "under a starry sky", "beside a quiet river", "in front of a mirror")
STYLES = ("oil painting", "studio photograph, soft light", "watercolour on rough paper", "seen from far above")


def prompts(turn: int, count: int) -> list[str]:
    """Others for each turn, 10 to 16 words."""
    made = []
    for i in range(turn * count, turn * count + count):
        subject, place, style = (table[(i * k + i // 5) % len(table)] for table, k in
                                 ((SUBJECTS, 1), (PLACES, 2), (STYLES, 3)))  # fmt: skip
        made.append(f"{subject} {place}, {style}, number {' '.join(str(i))}")
    return made


def pictures(count: int) -> Any:
    """(count, 3, SIDE, SIDE) bytes: coloured clouds, each its own."""
    import torch

    coarse = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8)


def write(folder: Path) -> None:
    """Weights and vocabularies in the layouts of the hub; runs in the reference's environment."""
    import gzip

    import torch

    torch.manual_seed(0)
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    home = folder / "openai" / "clip"  # torchmetrics knows CLIP by this name
    home.mkdir(parents=True)
    # CLIP's own vocabulary, which comes with open_clip
    package = importlib.util.find_spec("open_clip")
    assert package and package.origin
    with gzip.open(Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m.split()) for m in merges),
             "<|startoftext|>", "<|endoftext|>"]  # fmt: skip
    (home / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (home / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer(str(home / "vocab.json"), str(home / "merges.txt"), model_max_length=77)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
            "projection_dim": 768, "bos_token_id": 49406, "eos_token_id": 49407}  # fmt: skip
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
              "patch_size": 14, "projection_dim": 768}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).save_pretrained(home)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(home)

    blip = folder / "bert-base-uncased"  # imscore asks for this name
    blip.mkdir()
    told = [word.strip(",") for turn in range(200) for prompt in prompts(turn, 8) for word in prompt.split()]
    (blip / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *dict.fromkeys(told)]) + "\n"
    )
    from imscore.imreward.model import ImageReward
    from transformers import BertTokenizer

    BertTokenizer(str(blip / "vocab.txt")).save_pretrained(blip)
    os.chdir(folder)
    model = ImageReward()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():  # the classes leave some at zero, and the rest without much to say
            torch.nn.init.normal_(parameter, std=0.03)
    torch.save(model.state_dict(), folder / "ImageReward.pt")


def theirs(kind: str, folder: Path) -> Callable[[Any, list[str]], list[float]]:
    """Bytes and prompts -> one value each, by the reference."""
    os.chdir(folder)
    if kind == "imagereward":
        from imscore.imreward.model import ImageReward
        from torch import load

        model = ImageReward()
        model.load_state_dict(load(folder / "ImageReward.pt", mmap=True))
        model.eval()
        return lambda images, texts: model.score(images, texts)[:, 0].tolist()
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore("openai/clip")
    # what `update` calls; `compute` would add the values of all pictures up
    return lambda images, texts: _clip_score_update(list(images), texts, metric.model, metric.processor)[0].tolist()


def ours(kind: str, folder: Path) -> Callable[[Any, list[str]], list[float]]:
    """Floats and prompts -> one value each, by rewardtune; for clipscore under torchmetrics' formula."""
    from rewardtune import load_reward

    options: dict[str, dict[str, Any]] = {
        "clipscore": {"model": str(folder / "openai" / "clip"), "prefix": "", "w": 100.0, "rounding": True},
        "imagereward": {
            "checkpoint": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert-base-uncased"),
        },
    }  # fmt: skip
    reward = load_reward(kind, **options[kind])

    def score(images: Any, texts: list[str]) -> list[float]:
        found = reward.score(images, texts)
        values: list[float] = (100 * found.parts["cosine"] if kind == "clipscore" else found.value).tolist()
        return values

    return score


def work(arm: str, kind: str, folder: Path, threads: int, count: int) -> None:
    """For every line on standard input, a JSON list of prompts, score the pictures; answer with a line of JSON."""
    import torch

    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    score = {"reference": theirs, "rewardtune": ours}[arm](kind, folder)
    images = pictures(count)
    if (arm, kind) != ("reference", "clipscore"):
        images = images.float() / 255
    print(json.dumps({"versions": {name: _version(name) for name in PACKAGES}}), file=answers, flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            began, cpu = time.perf_counter(), time.process_time()
            values = score(images, json.loads(line))
            answer = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "values": values}
            print(json.dumps(answer), file=answers, flush=True)


PACKAGES = ("torch", "transformers", "torchmetrics", "imscore", "rewardtune")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Worker:
    """A process that scores when it is told to."""

    def __init__(self, python: str, arm: str, kind: str, folder: Path, threads: int, count: int) -> None:
        given = [arm, kind, str(folder), str(threads), str(count)]
        self.process = subprocess.Popen([python, __file__, "--work", *given], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        env=environment(arm))  # fmt: skip
        self.versions = {name: found for name, found in self._answer()["versions"].items() if found}

    def ask(self, texts: list[str]) -> dict[str, Any]:
        assert self.process.stdin
        print(json.dumps(texts), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: run it by hand to see why: {self.process.args}")
        return dict(json.loads(line))

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def environment(arm: str) -> dict[str, str]:
    given = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if arm == "reference":  # has its own packages and no rewardtune
        given.pop("PYTHONPATH", None)
    return given


def compare(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides in turns, with prompts that are new and with the same again."""
    shared = (kind, folder, args.threads, args.pictures)
    workers = {"rewardtune": Worker(sys.executable, "rewardtune", *shared),
               "reference": Worker(args.reference, "reference", *shared)}  # fmt: skip
    seen: dict[str, dict[str, list[dict[str, Any]]]] = {
        asked: {arm: [] for arm in workers} for asked in ("new prompts", "the same prompts again")
    }
    for turn in range(WARM + args.repeats):
        for arms in seen.values():
            for arm in list(workers)[:: 1 if turn % 2 else -1]:
                answer = workers[arm].ask(prompts(turn, args.pictures))
                if turn >= WARM:
                    arms[arm].append(answer)
    document: dict[str, Any] = {
        "repeats": args.repeats,
        "load": os.getloadavg()[0],
        "reference": KINDS[kind],
        "versions": {arm: worker.versions for arm, worker in workers.items()},
    }
    for worker in workers.values():
        worker.end()
    for asked, arms in seen.items():
        pairs = [o["seconds"] / t["seconds"] for o, t in zip(arms["rewardtune"], arms["reference"], strict=True)]
        best = {arm: min(a["seconds"] for a in answers) for arm, answers in arms.items()}
        middle = {arm: statistics.median(a["seconds"] for a in answers) for arm, answers in arms.items()}
        cpu = {arm: statistics.median(a["cpu"] for a in answers) for arm, answers in arms.items()}
        document[asked] = {
            "seconds": {arm: {"min": best[arm], "median": middle[arm], "cpu_median": cpu[arm]} for arm in arms},
            "pictures_a_second": {arm: args.pictures / best[arm] for arm in arms},
            "throughput_ratio": {"of_min": best["reference"] / best["rewardtune"],
                                 "of_median": middle["reference"] / middle["rewardtune"],
                                 "of_cpu_median": cpu["reference"] / cpu["rewardtune"],
                                 "median_of_pairs": 1 / statistics.median(pairs)},
        }  # fmt: skip
    values = {arm: [v for a in answers for v in a["values"]] for arm, answers in seen["new prompts"].items()}
    differences = [abs(o - t) for o, t in zip(values["rewardtune"], values["reference"], strict=True)]
    document["values"] = {
        "largest_difference": max(differences),
        "standard_deviation": statistics.pstdev(values["reference"]),
        "smallest_and_largest": [min(values["reference"]), max(values["reference"])],
    }
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="build/reference/bin/python", help="python of the environment above")
    parser.add_argument("--rewards", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="keep the weights in this folder, 4 GB; a temporary one if absent")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--work", nargs=5, metavar=("ARM", "KIND", "FOLDER", "THREADS", "PICTURES"),
                        help=argparse.SUPPRESS)  # fmt: skip
    args = parser.parse_args()
    if args.work:
        arm, kind, folder, threads, count = args.work
        work(arm, kind, Path(folder), int(threads), int(count))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.weights or Path(temporary)).resolve()
        if not (folder / "ImageReward.pt").is_file():
            code = (
                f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import reward_throughput, pathlib; "
            )
            subprocess.run([args.reference, "-c", code + f"reward_throughput.write(pathlib.Path({str(folder)!r}))"],
                           check=True, env=environment("reference"))  # fmt: skip
        found = {}
        for kind in args.rewards:
            found[kind] = compare(kind, args, folder)
            print(kind, json.dumps(found[kind], indent=1), flush=True)
    document = {
        "what": f"seconds for {args.pictures} pictures of {SIDE} x {SIDE}, from memory to numbers, without gradient; "
        "throughput ratio above 1: rewardtune is faster",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": args.threads},
        "python": platform.python_version(),
        "rewards": found,
    }  # fmt: skip
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
