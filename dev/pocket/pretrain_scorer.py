"""Train the base of the pocket scorer: a stand-in for a pretrained vision-language model, from nothing.

Run by `make pocket`, before `reward_sft`. A small network cannot learn to see from score labels alone, so it first
learns to read drawn scenes: which object covers each patch, the caption of what is drawn, whether a claimed caption
fits and which claim does not, and which fault the drawing has. It never sees a score. Writes a scorer folder.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5.modeling_qwen3_5 as qwen
from safetensors.torch import load_file, save_file
from scorer_base import build_model, build_tokenizer, export, word_list, write_card
from scorer_lessons import (
    CONCEPT_CLASSES,
    KINDS,
    NAMES,
    SEGMENTS,
    SEVERITIES,
    TINT_CLASSES,
    Example,
    Layout,
    Teacher,
    soften,
    truths,
)
from torch import Tensor, nn
from transformers import Qwen3_5ForConditionalGeneration

from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.scenes import SIZE, render, sample_scene


class Heads(nn.Module):
    """Read-outs used only here: they hand the vision tower and the claim's words a target of their own."""

    def __init__(self, vision: int, hidden: int) -> None:
        super().__init__()
        self.concept = nn.Linear(vision, len(CONCEPT_CLASSES))
        self.tint = nn.Linear(vision, len(TINT_CLASSES))
        self.fault = nn.Linear(vision, 1 + len(FAULTS))
        self.severity = nn.Linear(vision, 1 + len(SEVERITIES))
        self.marks = nn.Linear(hidden, len(KINDS))
        self.place = nn.Linear(hidden, 2)
        self.naming_scale = nn.Parameter(torch.tensor(10.0))


def patch_pixels(pictures: Tensor, *, patch: int, merge: int) -> Tensor:
    """uint8 (B, 3, H, W) -> rows of the vision tower, in its order."""
    b, c, h, w = pictures.shape
    x = pictures.float() / 127.5 - 1
    x = x.reshape(b, c, h // patch // merge, merge, patch, w // patch // merge, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return x.expand(*x.shape[:6], 2, patch, patch).reshape(b * (h // patch) * (w // patch), -1)


def merge_order(side: int, merge: int) -> np.ndarray:
    """Index of the vision tower's rows in a row-major patch grid."""
    grid = np.arange(side * side).reshape(side // merge, merge, side // merge, merge)
    return grid.transpose(0, 2, 1, 3).ravel()


def speed_up(tokens_per_image: int) -> None:
    """All pictures have one size here: attend over them in one batch, and make the patch convolution a product."""

    def attend(self: Any, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        rows = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).reshape(rows, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        q, k = qwen.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (t.reshape(-1, tokens_per_image, self.num_heads, t.shape[-1]).transpose(1, 2) for t in (q, k, v))
        return self.proj(_attention(q, k, v, None, self.scaling).transpose(1, 2).reshape(rows, -1))

    qwen.Qwen3_5VisionAttention.forward = attend
    qwen.Qwen3_5VisionPatchEmbed.forward = lambda self, x: F.linear(x, self.proj.weight.flatten(1), self.proj.bias)
    qwen.ALL_ATTENTION_FUNCTIONS.register("plain", _text_attention)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    # written out: the fused CPU kernel's backward is about ten times slower in bfloat16
    scores = (q.to(v.dtype) @ k.to(v.dtype).transpose(-1, -2)).float() * scaling
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def _text_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **kwargs: Any) -> Any:
    repeat = q.shape[1] // k.shape[1]
    out = _attention(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def vision_loss(heads: Heads, patches: Tensor, examples: Sequence[Example], order: np.ndarray) -> dict[str, Tensor]:
    """Patch and fault supervision. patches: (B, P, width) in the tower's order."""
    concept = torch.from_numpy(np.stack([e.concept[order] for e in examples]))
    tint = torch.from_numpy(np.stack([e.tint[order] for e in examples]))
    fault = torch.tensor([e.fault for e in examples])
    severity = torch.tensor([e.severity for e in examples])
    pooled = patches.mean(1)
    guess = heads.concept(patches).float()
    weight = torch.ones(guess.shape[-1])
    weight[0] = 0.3
    seen = concept > 0
    return {
        "concept": F.cross_entropy(guess.flatten(0, 1), concept.flatten(), weight, ignore_index=-1),
        "tint": 0.5 * F.cross_entropy(heads.tint(patches).float().flatten(0, 1), tint.flatten(), ignore_index=-1),
        "fault": 0.3 * F.cross_entropy(heads.fault(pooled).float(), fault, ignore_index=-1),
        "severity": 0.2 * F.cross_entropy(heads.severity(pooled).float(), severity, ignore_index=-1),
        "patch_accuracy": (guess.argmax(-1) == concept)[seen].float().mean(),
    }


def losses(
    model: Qwen3_5ForConditionalGeneration, heads: Heads, layout: Layout, examples: Sequence[Example], *,
    text: bool, order: np.ndarray,
) -> dict[str, Tensor]:  # fmt: skip
    """Every loss of one batch, by name; `patch_accuracy` and `verdict` are figures to look at."""
    vision = model.config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    pictures = torch.from_numpy(np.stack([e.picture for e in examples]))
    side = SIZE // patch
    grid = torch.tensor([[1, side, side]] * len(examples))
    rows = patch_pixels(pictures, patch=patch, merge=merge)
    seen = model.model.visual(rows, grid_thw=grid)
    patches = seen.last_hidden_state.reshape(len(examples), side * side, -1)
    out = vision_loss(heads, patches, examples, order)
    if not text:
        return out
    # an image token learns to stand near the words for what it shows, so that words find it by attention
    names = torch.from_numpy(np.stack([e.names for e in examples]))
    vocabulary_rows = model.get_input_embeddings().weight[[model.word_ids[w] for w in NAMES]]
    near = seen.pooler_output.reshape(len(examples), -1, vocabulary_rows.shape[1]) @ vocabulary_rows.T
    called = -(names * (near.float() * heads.naming_scale).log_softmax(-1)).sum(-1)
    out["names"] = 0.5 * called.sum() / names.sum()
    ids, targets, marks, places = layout.pack(examples)
    embedded = model.get_input_embeddings()(ids)
    image = (ids == model.config.image_token_id)[..., None].expand_as(embedded)
    embedded = embedded.masked_scatter(image, seen.pooler_output.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=layout.mask, position_ids=layout.positions.expand(3, len(examples), -1),
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    yes, no = (model.word_ids[w] for w in ("yes", "no"))
    taught = targets != -100
    aims = targets[taught]
    logits = model.lm_head(hidden[taught]).float()
    each = F.cross_entropy(logits, aims, reduction="none")
    verdict = (aims == yes) | (aims == no)
    weight = torch.where(aims == yes, 2.0, 1.0)  # one claim in three is true
    out["words"] = each[~verdict].mean()
    out["answer"] = (each * weight)[verdict].sum() / weight[verdict].sum()
    guess = heads.marks(hidden[marks[:, 0], marks[:, 1]]).float().gather(1, marks[:, 2:3])[:, 0]
    truth = marks[:, 3].float()
    # broken claims are the rarer ones
    out["marks"] = F.binary_cross_entropy_with_logits(guess, truth, torch.where(truth > 0, 1.0, 3.0))
    found = heads.place(hidden[places[:, 0].long(), places[:, 1].long()]).float()
    out["place"] = 10 * (found - places[:, 2:]).pow(2).mean()
    picked = logits[verdict]
    out["verdict"] = ((picked[:, yes] > picked[:, no]) == (aims[verdict] == yes)).float().mean()
    return out


def batches(teacher: Teacher, *, seed: int, start: int, size: int, text: bool) -> Iterator[list[Example]]:
    step = start
    while True:
        yield [teacher.example(random.Random(f"scorer:{seed}:{step}:{i}"), text=text) for i in range(size)]
        step += 1


@torch.no_grad()
def matching_accuracy(
    model: Qwen3_5ForConditionalGeneration, teacher: Teacher, layout: Layout, *, soft: bool, count: int = 384
) -> dict[str, float]:
    """Share of right verdicts on scenes of the validation split: the true caption, and two that do not fit."""
    rng = random.Random(f"match:{soft}")
    yes, no = (model.word_ids[w] for w in ("yes", "no"))
    examples, kinds = [], []
    while len(examples) < count:
        scene = sample_scene(rng, "validation")
        wrong = [m for m in (misread(scene, rng) for _ in range(8)) if not all(ok for *_, ok in truths(m, scene))]
        if len(wrong) < 2:
            continue
        picture = render(scene)
        picture = soften(picture, rng) if soft else picture
        segments = [teacher.segment(claim, scene, -1, -1) for claim in (scene, *wrong[:2])]
        kinds.append([next((k for k, _, ok in truths(m, scene) if ok is False)) for m in wrong[:2]])
        concept, tint = teacher.patches(scene)
        names = teacher.names(concept, tint, scene.background)
        examples.append(Example(np.asarray(picture).transpose(2, 0, 1), concept, tint, names, -1, -1, segments))
    vision = model.config.vision_config
    side = SIZE // vision.patch_size
    right: dict[str, list[bool]] = {"true": []}
    for first in range(0, count, 64):
        part = examples[first : first + 64]
        pictures = torch.from_numpy(np.stack([e.picture for e in part]))
        rows = patch_pixels(pictures, patch=vision.patch_size, merge=vision.spatial_merge_size)
        seen = model.model.visual(rows, grid_thw=torch.tensor([[1, side, side]] * len(part))).pooler_output
        ids, targets, *_ = layout.pack(part)
        embedded = model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], seen.to(embedded.dtype))
        hidden = model.model.language_model(
            inputs_embeds=embedded, attention_mask=layout.mask, use_cache=False,
            position_ids=layout.positions.expand(3, len(part), -1),
        ).last_hidden_state  # fmt: skip
        places = ((targets == yes) | (targets == no)).nonzero()
        logits = model.lm_head(hidden[places[:, 0], places[:, 1]])
        said = (logits[:, yes] > logits[:, no]).reshape(len(part), SEGMENTS).tolist()
        for row, (true, *false) in enumerate(said):
            right["true"].append(true)
            for kind, answer in zip(kinds[first + row], false, strict=True):
                right.setdefault(kind, []).append(not answer)
    figures = {f"match/{k}": sum(v) / len(v) for k, v in right.items()}
    wrong_rate = [x for k, v in right.items() if k != "true" for x in v]
    figures["match"] = (figures["match/true"] + sum(wrong_rate) / len(wrong_rate)) / 2
    return {k: round(v, 4) for k, v in figures.items()}


def ramp(step: int, *, steps: int, stable: float) -> float:
    """Warm-up over 100 steps, a plateau until `stable`, then a straight line to almost nothing."""
    return min((step + 1) / 100, 1.0, max(0.02, (1 - step / steps) / (1 - stable)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--see-steps", type=int, default=1500, help="vision tower alone, dense supervision")
    parser.add_argument("--steps", type=int, default=2200, help="all of it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="about 1.8 times faster after two minutes of compiling")
    parser.add_argument("--init", type=Path, help="state.safetensors to start from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    vision = model.config.vision_config
    side = SIZE // vision.patch_size
    image_tokens = (side // vision.spatial_merge_size) ** 2
    speed_up(side * side)
    model.model.language_model.config._attn_implementation = "plain"
    model.word_ids = {word: i for i, word in enumerate(word_list())}
    heads = Heads(vision.hidden_size, model.config.text_config.hidden_size)
    both = nn.ModuleDict({"model": model, "heads": heads})
    if args.init:
        found, own = load_file(args.init), both.state_dict()
        both.load_state_dict({k: v for k, v in found.items() if k in own and own[k].shape == v.shape}, strict=False)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} words", flush=True)
    teacher = Teacher(patch=vision.patch_size)
    layout = Layout(model.word_ids, image_tokens)
    order = merge_order(side, vision.spatial_merge_size)
    if args.compile:
        for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
            block.compile()
    args.out.mkdir(parents=True, exist_ok=True)
    started, done = time.time(), 0
    for text, steps in ((False, args.see_steps), (True, args.steps)):
        if steps == 0:
            continue
        groups = []
        for wide in (True, False):
            for seeing in (True, False):
                members = [p for n, p in both.named_parameters() if (p.ndim >= 2) == wide and ("visual" in n) == seeing]
                # the vision tower has had its own stage by the time that text comes in
                lr = args.lr * (0.4 if text and seeing else 1.0)
                groups.append({"params": members, "lr": lr, "weight_decay": 0.02 if wide else 0.0})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        shape = partial(ramp, steps=steps, stable=0.6 if text else 0.85)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        seen: dict[str, float] = {}
        stream = batches(teacher, seed=args.seed, start=done, size=args.batch, text=text)
        for step in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                parts = losses(model, heads, layout, next(stream), text=text, order=order)
            figures = {k: parts.pop(k) for k in ("patch_accuracy", "verdict") if k in parts}
            loss = sum(parts.values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            for k, v in {**parts, **figures}.items():
                seen[k] = 0.95 * seen.get(k, v.item()) + 0.05 * v.item()
            if step % 50 == 0 or step == steps - 1:
                line = " ".join(f"{k} {v:.3f}" for k, v in seen.items())
                print(f"{'all' if text else 'see'} {step} {line} {time.time() - started:.0f} s", flush=True)
            if text and (step % 200 == 199 or step == steps - 1):
                save_file({k: v.clone() for k, v in both.state_dict().items() if "lm_head" not in k},
                          args.out.with_suffix(".state.safetensors"))  # fmt: skip
                model.eval()
                figures = {"clean": matching_accuracy(model, teacher, layout, soft=False),
                           "soft": matching_accuracy(model, teacher, layout, soft=True)}  # fmt: skip
                model.train()
                print(json.dumps(figures), flush=True)
        done += steps
        save_file({k: v.clone() for k, v in both.state_dict().items() if "lm_head" not in k},
                  args.out.with_suffix(".state.safetensors"))  # fmt: skip
    export(model, tokenizer, args.out)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()), "matching_clean": figures["clean"],
        "matching_soft": figures["soft"], "see_steps": args.see_steps, "steps": args.steps, "batch": args.batch,
        "seed": args.seed, "cpu_minutes": round(time.process_time() / 60),
        "minutes": round((time.time() - started) / 60),
    }  # fmt: skip
    write_card(args.out, report)
    print(report)


if __name__ == "__main__":
    main()
