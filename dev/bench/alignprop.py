"""Seconds of an optimiser step, and peak live bytes, against AlignProp of trl 0.22.2 on the same tiny SD 1.x.

    python -m venv build/trl
    build/trl/bin/pip install torch==2.13.0 trl==0.22.2 transformers==4.56.2 diffusers==0.35.2 peft==0.17.1 \\
        accelerate==1.10.1
    python dev/bench/alignprop.py --trl build/trl/bin/python

Two processes, one thread each, that wait for each other: one works while the other sleeps, arms alternate step by step
and swap places every time. Both draw 10 DDIM steps of 2 images of 64 x 64 pixels at guidance 5, train LoRA of rank 4 on
the UNet's attention, and maximise the redness of the decoded image with AdamW. Writes alignprop.json beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, BATCH, GUIDANCE, RANK, LR = 10, 2, 5.0, 4, 1e-3
SETTINGS = {"K=1": (1, "fast"), "K=5": (5, "fast"), "full chain": (STEPS, "flat")}
"""Name -> denoising steps with gradient, and rewardtune's memory mode; trl has one, which checkpoints every step."""
PROMPT = "a b c"
WARM = 2


def build(folder: Path) -> None:
    """A StableDiffusionPipeline with random weights: UNet of 64 and 128 channels, latents of 32 x 32."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=16, bos_token_id=0,
                          eos_token_id=1)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, sample_size=64,
                          down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=32, block_out_channels=(32, 64), layers_per_block=2,
                                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe")
    for name in ("vocab.json", "merges.txt"):  # transformers 5 leaves them out, 4 wants them
        shutil.copy(folder / name, folder / "pipe/tokenizer" / name)


def theirs(folder: Path, steps: int, mode: str) -> Callable[[], float]:
    """One optimiser step of trl's AlignPropTrainer, as a function that returns the reward."""
    import warnings

    warnings.filterwarnings("ignore")
    from accelerate import PartialState

    PartialState(cpu=True)  # before the pipeline, or it crashes
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder / "pipe"), use_lora=True)
    pipeline.set_progress_bar_config = lambda **_: None
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    config = AlignPropConfig(
        mixed_precision=None, sample_num_steps=STEPS, sample_guidance_scale=GUIDANCE, sample_eta=0.0,
        train_batch_size=BATCH, train_learning_rate=LR, truncated_backprop_rand=False,
        truncated_backprop_timestep=STEPS - steps, save_freq=10**9, num_epochs=1,
    )  # fmt: skip
    seen: list[float] = []

    def redness(images: Any, prompts: Any, metadata: Any) -> Any:
        reward = (images[:, 0] - images[:, 2]).mean((1, 2))
        seen.append(float(reward.detach().mean()))
        return reward

    trainer = AlignPropTrainer(config, redness, lambda: (PROMPT, {}), pipeline)

    def step() -> float:
        trainer.step(0, 0)
        return seen[-1]

    return step


def ours(folder: Path, steps: int, mode: str) -> Callable[[], float]:
    """One optimiser step of rewardtune's loop, as a function that returns the reward."""
    from rewardtune.build import build_task
    from rewardtune.recipe.sections import DirectRewardRecipe
    from rewardtune.registry import load_plugin
    from rewardtune.training import loop, runtime
    from rewardtune.training.signals import Stop
    from rewardtune.training.state import build_state

    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPT + "\n")
    load_plugin(str(Path(__file__).parents[2] / "tests" / "unit" / "redness.py"))
    recipe = DirectRewardRecipe.model_validate({
        "task": "direct_reward", "pipeline": {"model": str(folder / "pipe")},
        "lora": {"rank": RANK, "targets": ["to_q", "to_k", "to_v", "to_out.0"]},
        "data": {"prompts": str(prompts)},
        "rollout": {"steps": STEPS, "guidance": "full", "guidance_scale": GUIDANCE},
        "gradient": {"method": "draft", "last_steps": steps, "memory": mode},
        "rewards": [{"name": "redness"}],
        "optimizer": {"name": "adamw", "lr": LR, "schedule": "constant", "warmup_steps": 0},
        "train": {"steps": 10**6, "batch_size": BATCH, "device": "cpu"},
    })  # fmt: skip
    task = build_task(recipe, device="cpu")
    where = runtime.start(device="cpu", precision="fp32")
    state = build_state(task, train=recipe.train, optimizer=recipe.optimizer, where=where)
    around = loop.Loop(folder, 10**9, 1, where, Stop())

    def step() -> float:
        values, _, problem = loop._step(task, state, train=recipe.train, share=BATCH, loop=around)
        assert not problem
        return float(values["reward/redness"])

    return step


def work(arm: str, folder: Path, setting: str) -> None:
    """Do one step for every line on standard input: `time` or `bytes`; answer with a line of JSON."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    step = {"trl": theirs, "rewardtune": ours}[arm](folder, *SETTINGS[setting])
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        if line.strip() == "bytes":
            file = Path(__file__).parents[2] / "rewardtune" / "training" / "live_bytes.py"
            spec = importlib.util.spec_from_file_location("live_bytes", file)  # trl's environment has no rewardtune
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found: float = module.peak_live_bytes(step)
            reward = 0.0
        else:
            began = time.perf_counter()
            reward = step()
            found = time.perf_counter() - began
        print(json.dumps({"found": found, "reward": reward}), file=answers, flush=True)


class Worker:
    """A process that does one step at a time."""

    def __init__(self, python: str, arm: str, folder: Path, setting: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([python, __file__, "--work", arm, str(folder), setting], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                                        stderr=subprocess.DEVNULL)  # fmt: skip
        self.torch = self._answer()["torch"]

    def ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin
        print(what, file=self.process.stdin, flush=True)
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


def compare(trl: str, folder: Path, setting: str, repeats: int) -> dict[str, Any]:
    """Both arms at one setting: seconds step by step in turns, then peak live bytes."""
    workers = {"trl": Worker(trl, "trl", folder, setting),
               "rewardtune": Worker(sys.executable, "rewardtune", folder, setting)}  # fmt: skip
    seconds: dict[str, list[float]] = {arm: [] for arm in workers}
    rewards: dict[str, list[float]] = {arm: [] for arm in workers}
    for turn in range(WARM + repeats):
        for arm in list(workers)[:: 1 if turn % 2 else -1]:
            answer = workers[arm].ask("time")
            rewards[arm].append(answer["reward"])
            if turn >= WARM:
                seconds[arm].append(answer["found"])
    peak = {arm: round(worker.ask("bytes")["found"]) for arm, worker in workers.items()}
    pairs = [o / t for o, t in zip(seconds["rewardtune"], seconds["trl"], strict=True)]
    out = {
        "memory": SETTINGS[setting][1],
        "seconds": {arm: {"min": min(s), "median": statistics.median(s), "max": max(s)} for arm, s in seconds.items()},
        "ratio": {"min": min(seconds["rewardtune"]) / min(seconds["trl"]), "median_of_pairs": statistics.median(pairs),
                  "quartiles_of_pairs": statistics.quantiles(pairs, n=4)[::2]},
        "peak_live_bytes": peak,
        "bytes_ratio": peak["rewardtune"] / peak["trl"],
        "reward_first_and_last": {arm: [r[0], r[-1]] for arm, r in rewards.items()},
        "torch": {arm: worker.torch for arm, worker in workers.items()},
    }  # fmt: skip
    for worker in workers.values():
        worker.end()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default="build/trl/bin/python", help="python of the environment with trl 0.22.2")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--work", nargs=3, metavar=("ARM", "FOLDER", "SETTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], Path(args.work[1]), args.work[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "sd"
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import alignprop, pathlib; "
        subprocess.run([args.trl, "-c", code + f"alignprop.build(pathlib.Path({str(home)!r}))"], check=True,
                       stderr=subprocess.DEVNULL)  # fmt: skip
        found = {}
        for setting in SETTINGS:
            found[setting] = compare(args.trl, home, setting, args.repeats)
            print(setting, json.dumps({k: found[setting][k] for k in ("ratio", "bytes_ratio")}), flush=True)
    document = {
        "what": "seconds of an optimiser step and peak live bytes, rewardtune over trl 0.22.2's AlignProp; tiny SD 1.x",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1, "load": os.getloadavg()[0]},
        "repeats": args.repeats,
        "settings": found,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
