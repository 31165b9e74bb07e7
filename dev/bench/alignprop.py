"""Seconds of an optimiser step, and peak live bytes, against AlignProp of trl 0.22.2 on the same tiny SD 1.x.

    python -m venv build/trl
    build/trl/bin/pip install torch==2.13.0 trl==0.22.2 transformers==4.56.2 diffusers==0.35.2 peft==0.17.1 \\
        accelerate==1.10.1
    python dev/bench/alignprop.py --trl build/trl/bin/python

Two processes, one thread each, that wait for each other: one works while the other sleeps, arms alternate step by step
and swap places every time. Both draw 10 DDIM steps of 2 images of 64 x 64 pixels at guidance 5, train LoRA of rank 4 on
the UNet's attention, and maximise the redness of the decoded image with AdamW. Writes alignprop.json beside this file.

That both do the same work is checked before anything is timed: from the same noise and the same adapters, the first
step must have the same reward and the same gradient (`--check` does that alone). Afterwards each draws noise in its own
way, trl from torch's global generator and rewardtune from one of each image's, so the rewards of timed steps differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STEPS, BATCH, GUIDANCE, RANK, LR = 10, 2, 5.0, 4, 1e-3
SETTINGS = {"K=1": (1, "fast"), "K=5": (5, "fast"), "full chain": (STEPS, "flat")}
"""Name -> denoising steps with gradient, and rewardtune's memory mode; trl has one, which checkpoints every step."""
PROMPT = "a b c"
WARM = 2
SAME = 1e-4
"""Largest difference of the two sides' rewards and gradients, relative: both round, by kernels of other versions."""
PACKAGES = ("torch", "trl", "transformers", "diffusers", "peft", "accelerate")

Arm = tuple[Callable[[], float], Callable[[], tuple[float, dict[str, Any]]]]
"""(one optimiser step that returns the reward, the same from given noise and adapters, and its gradients by layer)."""


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


def given_noise() -> Any:
    import torch

    return torch.randn(BATCH, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def set_adapters(named: Mapping[str, Any]) -> None:
    """The same numbers on both sides, by the layers' names; the second matrix is not zero, or the first would have no
    gradient."""
    import torch

    with torch.no_grad():
        for name, parameter in named.items():
            key = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=key) * 0.05)


def plain_names(named: Any) -> dict[str, Any]:
    """Trained parameters by layer and matrix, without the names that wrappers and adapters add."""
    found = {}
    for name, parameter in named:
        if parameter.requires_grad:
            layer, matrix = name.split(".lora_")
            found[f"{layer[layer.index('blocks') - 5 :].lstrip('._')}.{matrix[0]}"] = parameter
    return found


def noted_gradients(optimizer: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Filled with what the optimiser is given at its next step."""
    found: dict[str, Any] = {}

    def note(*_: Any) -> None:
        if not found:
            found.update({name: parameter.grad.clone() for name, parameter in named.items()})

    optimizer.register_step_pre_hook(note)
    return found


def theirs(folder: Path, steps: int, mode: str) -> Arm:
    """trl's AlignPropTrainer."""
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
        train_batch_size=BATCH, train_learning_rate=LR, train_adam_weight_decay=0.0, truncated_backprop_rand=False,
        truncated_backprop_timestep=STEPS - steps, save_freq=10**9, num_epochs=1,
    )  # fmt: skip
    seen: list[float] = []

    def redness(images: Any, prompts: Any, metadata: Any) -> Any:
        reward = (images[:, 0] - images[:, 2]).mean((1, 2))
        seen.append(float(reward.detach().mean()))
        return reward, {}  # the trainer unpacks two: of a tensor of two rewards it would train on the first alone

    trainer = AlignPropTrainer(config, redness, lambda: (PROMPT, {}), pipeline)

    def step() -> float:
        trainer.step(0, 0)
        return seen[-1]

    def check() -> tuple[float, dict[str, Any]]:
        named = plain_names(pipeline.unet.named_parameters())
        set_adapters(named)
        gradients = noted_gradients(trainer.optimizer.optimizer, named)
        draw, noise = pipeline.sd_pipeline.prepare_latents, given_noise()
        pipeline.sd_pipeline.prepare_latents = lambda *_: noise
        reward = step()
        pipeline.sd_pipeline.prepare_latents = draw
        return reward, gradients

    return step, check


def ours(folder: Path, steps: int, mode: str) -> Arm:
    """rewardtune's loop."""
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

    def check() -> tuple[float, dict[str, Any]]:
        named = plain_names(task.pipeline.pipe.unet.named_parameters())
        set_adapters(named)
        gradients = noted_gradients(state.optimizer, named)
        draw, noise = task.pipeline.noise, given_noise()
        task.pipeline.noise = lambda *_: noise
        reward = step()
        task.pipeline.noise = draw
        return reward, gradients

    return step, check


def work(arm: str, folder: Path, setting: str) -> None:
    """Do one step for every line on standard input: `check`, `time` or `bytes`; answer with a line of JSON."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    step, check = {"trl": theirs, "rewardtune": ours}[arm](folder, *SETTINGS[setting])
    print(json.dumps({"versions": versions()}), file=answers, flush=True)
    for line in sys.stdin:
        found: float
        if line.strip() == "check":
            from safetensors.torch import save_file

            reward, gradients = check()
            found = math.sqrt(sum(float(gradient.double().pow(2).sum()) for gradient in gradients.values()))
            save_file(gradients, folder / f"{arm}.safetensors")
        elif line.strip() == "bytes":
            file = Path(__file__).parents[2] / "rewardtune" / "training" / "live_bytes.py"
            spec = importlib.util.spec_from_file_location("live_bytes", file)  # trl's environment has no rewardtune
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found = module.peak_live_bytes(step)
            reward = 0.0
        else:
            began = time.perf_counter()
            reward = step()
            found = time.perf_counter() - began
        print(json.dumps({"found": found, "reward": reward}), file=answers, flush=True)


def versions() -> dict[str, str]:
    """Of this process's environment."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The commit that is measured, with a mark where files differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, text=True, capture_output=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/rewardtune", ":/pipelines", ":/dev/bench")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


class Worker:
    """A process that does one step at a time."""

    def __init__(self, python: str, arm: str, folder: Path, setting: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([python, __file__, "--work", arm, str(folder), setting], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                                        stderr=subprocess.DEVNULL)  # fmt: skip
        self.versions = self._answer()["versions"]

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


def same_work(workers: Mapping[str, Worker], folder: Path) -> dict[str, Any]:
    """One step of both arms from the same noise and adapters. Ends the program where reward or gradient differ."""
    from safetensors.torch import load_file

    answers = {arm: worker.ask("check") for arm, worker in workers.items()}
    gradients = [load_file(folder / f"{arm}.safetensors") for arm in workers]
    if gradients[0].keys() != gradients[1].keys():
        raise SystemExit(f"the arms train other layers: {sorted(gradients[0].keys() ^ gradients[1].keys())}")
    apart = math.sqrt(sum(float((gradients[0][n] - gradients[1][n]).double().pow(2).sum()) for n in gradients[0]))
    rewards, norms = ([answers[arm][key] for arm in workers] for key in ("reward", "found"))
    found = {
        "trained": sum(tensor.numel() for tensor in gradients[0].values()),
        "reward": dict(zip(workers, rewards, strict=True)),
        "gradient_norm": dict(zip(workers, norms, strict=True)),
        "reward_difference": abs(rewards[0] - rewards[1]) / abs(rewards[0]),
        "gradient_difference": apart / norms[0],
    }
    if not max(found["reward_difference"], found["gradient_difference"]) <= SAME:
        raise SystemExit(f"the arms do not do the same work: {json.dumps(found)}")
    return found


def start(trl: str, folder: Path, setting: str) -> dict[str, Worker]:
    """Both arms."""
    return {"trl": Worker(trl, "trl", folder, setting),
            "rewardtune": Worker(sys.executable, "rewardtune", folder, setting)}  # fmt: skip


def compare(workers: Mapping[str, Worker], folder: Path, setting: str, repeats: int) -> dict[str, Any]:
    """Both arms at one setting: that they do the same, seconds step by step in turns, then peak live bytes."""
    same = same_work(workers, folder)
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
        "same_work": same,
        "seconds": {arm: {"min": min(s), "median": statistics.median(s), "max": max(s)} for arm, s in seconds.items()},
        "ratio": {"min": min(seconds["rewardtune"]) / min(seconds["trl"]), "median_of_pairs": statistics.median(pairs),
                  "quartiles_of_pairs": statistics.quantiles(pairs, n=4)[::2]},
        "peak_live_bytes": peak,
        "bytes_ratio": peak["rewardtune"] / peak["trl"],
        "reward_first_and_last": {arm: [r[0], r[-1]] for arm, r in rewards.items()},
    }  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default="build/trl/bin/python", help="python of the environment with trl 0.22.2")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="only whether both do the same work; writes nothing")
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
        found: dict[str, Any] = {}
        installed: dict[str, dict[str, str]] = {}
        for setting in SETTINGS:
            workers = start(args.trl, home, setting)
            installed = {arm: worker.versions for arm, worker in workers.items()}
            if args.check:
                print(setting, json.dumps(same_work(workers, home)), flush=True)
            else:
                found[setting] = compare(workers, home, setting, args.repeats)
                print(setting, json.dumps({k: found[setting][k] for k in ("ratio", "bytes_ratio")}), flush=True)
            for worker in workers.values():
                worker.end()
    if args.check:
        print(json.dumps({"versions": installed, "revision": revision()}))
        return
    document = {
        "what": "seconds of an optimiser step and peak live bytes, rewardtune over trl 0.22.2's AlignProp; tiny SD 1.x",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1, "load": os.getloadavg()[0]},
        "versions": installed,
        "revision": revision(),
        "repeats": args.repeats,
        "settings": found,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
