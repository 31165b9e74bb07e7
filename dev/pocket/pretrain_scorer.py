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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5.modeling_qwen3_5 as qwen
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from rewardtune.pocket.faults import FAULTS, misread
from rewardtune.pocket.scenes import CONCEPTS, SIZE, TINTS, Scene, render, sample_scene, vocabulary

SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<think>", "</think>"]  # fmt: skip
LEVELS = [*"123456789"]
DIMENSIONS = ["alignment", "realism", "aesthetics", "plausibility"]
FAULT_WORDS = {"blur": "blurry", "grain": "grainy", "blotches": "blotchy", "wobble": "wobbly", "smear": "smeared",
               "pale": "pale", "cast": "tinted", "shear_halves": "broken", "ghosting": "doubled"}  # fmt: skip
SEVERITIES = ["slight", "visible", "strong", "severe"]
KINDS = ["object", "count", "colour", "size", "relation", "background"]
# words a judgement in text needs; kept in the tokenizer so that the base can be taught to reason later
JUDGEMENT = """
system user assistant describe rate score scores level reason because so but and or not no yes the is are it this that
there here has have be of in at by for from than as
very quite too more less most least all none some only also still almost nearly exactly clearly slightly mostly fully
picture image drawing prompt caption claim claims fact facts asked asks shows show shown drawn draws looks look seen see
object objects count colour color size relation background position place side edge edges outline outlines shape shapes
wrong right correct missing extra different same swapped other another instead present absent matches match fits fit
one zero four five single both each every which what
fault faults clean sharp soft crisp blurry blur noisy grainy grain blotchy blotches wobbly wobble bent smeared smear
melted pale dull faded washed tinted cast dark darker bright flat uneven broken split cut sheared doubled ghosting ghost
overlapping distorted messy smooth clear unclear recognisable artefact artefacts texture contrast colours natural
unnatural slight visible strong severe mild minor major small none perfect excellent good fair poor bad awful
realism alignment aesthetics plausibility realistic pleasing plausible impossible balanced composition
subject first second third higher lower better worse middle high low between about around half
. , : ; ! ? ( ) - + = / % ' "
""".split()
# words of the panel's critiques that are not above
CRITIQUE = """
everything cleanly text flaws flaw nothing complain content otherwise little covered noise clouds badly deformed partly
hardly any shading shifted break faint double contours twice own its torn moved patchy details detail lines line
"""
WORDS = 520
"""Rows of the vocabulary before the word pieces; those that no word takes are spare."""
# head labels that no caption word marks
TINT_CLASSES = ["nothing", "natural", *sorted(TINTS)]
CONCEPT_CLASSES = ["nothing", *sorted(CONCEPTS)]
SEGMENTS, SEGMENT = 3, 34


def word_list() -> list[str]:
    """The vocabulary's first rows: special tokens, level digits, words and punctuation, spare rows."""
    words = [*SPECIAL, *LEVELS, *vocabulary(), *JUDGEMENT, *CRITIQUE.split()]
    words = list(dict.fromkeys(words))
    return words + [f"<spare_{i}>" for i in range(WORDS - len(words))]


def build_tokenizer() -> Qwen3_5Tokenizer:
    """Qwen3.5's own tokenizer class, with merges that make every word one token (with the space before it).

    Digits are split as in the real vocabulary; a word that is not in the list falls into pieces and bytes.
    """
    words = word_list()
    # role names follow a special token, without a space
    texts = [w if w in ("user", "assistant") else f" {w}" for w in words if w.isalpha()]
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=5000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    found = json.loads(pieces.to_str())["model"]
    spelled = [w if not w.isalpha() or w in ("user", "assistant") else f"\u0120{w}" for w in words]
    table = {w: i for i, w in enumerate(dict.fromkeys([*spelled, *sorted(found["vocab"], key=found["vocab"].get)]))}
    tokenizer = Qwen3_5Tokenizer(
        vocab=table, merges=[tuple(m) for m in found["merges"]], unk_token="<unk>", pad_token="<pad>",
        eos_token="<|im_end|>", padding_side="left", extra_special_tokens=SPECIAL[2:], model_max_length=1024,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}"
        "{% if m.content is string %} {{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    return tokenizer


def build_rubric() -> dict[str, Any]:
    """What `rubric.json` says: how the score is asked for and read."""
    return {
        "version": 1,
        "dimensions": DIMENSIONS,
        "levels": [{"token": text, "value": 1 + k / 2} for k, text in enumerate(LEVELS)],
        "template": "<|im_start|>user<|vision_start|>{image}<|vision_end|> {prompt}<|im_end|><|im_start|>assistant",
        "reads": [f" {name}:" for name in DIMENSIONS],
        "temperature": 1.0,
    }


def build_model(tokenizer: Qwen3_5Tokenizer, *, patch: int = 8) -> Qwen3_5ForConditionalGeneration:
    """The real class, small: 64 patches, 16 image tokens, full attention (the torch form of linear layers is slow)."""
    ids = tokenizer.convert_tokens_to_ids
    hidden, vision = 192, 160
    text = {
        "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "layer_types": ["full_attention"] * 4,
        "tie_word_embeddings": True, "max_position_embeddings": 1024, "pad_token_id": ids("<pad>"),
        "eos_token_id": ids("<|im_end|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                            "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    eye = {
        "depth": 5, "hidden_size": vision, "intermediate_size": 448, "num_heads": 5, "patch_size": patch,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": hidden,
        "num_position_embeddings": (SIZE // patch) ** 2,
    }  # fmt: skip
    config = Qwen3_5Config(
        text_config=text, vision_config=eye, tie_word_embeddings=True, image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"), vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return Qwen3_5ForConditionalGeneration(config)


def export(model: Qwen3_5ForConditionalGeneration, tokenizer: Qwen3_5Tokenizer, folder: Path) -> None:
    """Write the folder that `rewardtune.scorer` loads; weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen3_5ForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision = model.config.vision_config
    Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
    ).save_pretrained(folder)  # fmt: skip
    (folder / "rubric.json").write_text(json.dumps(build_rubric(), indent=2) + "\n")


# --- what is drawn, and what may be said of it ---------------------------------------------------------------------


def truths(claim: Scene, drawn: Scene) -> list[tuple[str, int, bool | None]]:
    """(kind, group, holds) of every fact that `claim` states, judged by the boxes of `drawn`; None: cannot be judged."""
    things = [(drawn.groups[b.group], b) for b in drawn.boxes]
    found = [[(g, b) for g, b in things if g.concept == group.concept] for group in claim.groups]

    def centre(group: int) -> tuple[float, float]:
        return tuple(float(np.mean([getattr(b, axis) for _, b in found[group]])) for axis in "xy")  # type: ignore

    def stands(first: int, relation: str, second: int) -> bool | None:
        if not (found[first] and found[second]):
            return None
        (ax, ay), (bx, by) = centre(first), centre(second)
        return {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[relation] > 8

    out: list[tuple[str, int, bool | None]] = []
    for i, group in enumerate(claim.groups):
        here = found[i]
        out.append(("object", i, bool(here)))
        out.append(("count", i, len(here) == group.count if here else None))
        out.append(("colour", i, all(g.tint == group.tint for g, _ in here) if here else None))
        if group.size:
            out.append(("size", i, all((b.side < 24) == (group.size == "small") and (b.side > 40) == (group.size == "large")
                                       for _, b in here) if here else None))  # fmt: skip
    if claim.relation:
        out.append(("relation", 1, stands(0, claim.relation, 1)))
    if claim.third:
        both = [stands(2, claim.third, 0), stands(2, claim.third, 1)]
        out.append(("relation", 2, None if None in both else all(both)))
    out.append(("background", 0, claim.background == drawn.background))
    return out


def without(scene: Scene, gone: int) -> Scene:
    """The scene that is left when one group is not drawn, with a caption of its own."""
    keep = [i for i in range(len(scene.groups)) if i != gone]
    if gone != 2 and len(keep) == 2:
        keep, relation = [2, keep[0]], scene.third
    else:
        relation = scene.relation if len(keep) == 2 else None
    boxes = tuple(replace(b, group=keep.index(b.group)) for b in scene.boxes if b.group != gone)
    return replace(scene, groups=tuple(scene.groups[i] for i in keep), relation=relation, third=None, boxes=boxes)


def soften(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Softness as small diffusion models and autoencoders leave it; no fault is named for it."""
    if rng.random() < 0.5:
        side = rng.randint(30, 52)
        picture = picture.resize((side, side), Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    else:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
    for name in ("blotches", "wobble", "smear"):
        if rng.random() < 0.25:
            picture = FAULTS[name][0](picture, rng.uniform(0, 0.35), rng)
    return picture


@dataclass
class Example:
    """A picture and everything that is taught of it."""

    picture: np.ndarray
    concept: np.ndarray
    tint: np.ndarray
    fault: int
    severity: int
    segments: list[tuple[list[int], list[int], list[tuple[int, int, int]]]]


class Teacher:
    """Draws examples. Compositions outside the training split never appear, drawn or claimed."""

    def __init__(self, tokenizer: Qwen3_5Tokenizer, *, patch: int) -> None:
        self.ids = {word: i for i, word in enumerate(word_list())}
        self.patch = patch
        self.faults = sorted(FAULTS)

    def words(self, text: str) -> list[int]:
        return [self.ids[w] for w in text.replace(",", " ,").split()]

    def example(self, rng: random.Random, *, text: bool = True) -> Example:
        scene = sample_scene(rng, "train")
        drawn, roll = scene, rng.random()
        if roll < 0.2 and len(scene.groups) > 1:
            drawn = without(scene, rng.randrange(len(scene.groups)))
        picture = render(drawn)
        fault, severity, roll = -1, -1, rng.random()
        if roll < 0.35:
            fault, severity = 0, 0
        elif roll < 0.65:
            picture = soften(picture, rng)
        else:
            name, strength = rng.choice(self.faults), rng.random()
            picture = FAULTS[name][0](picture, strength, rng)
            fault, severity = 1 + self.faults.index(name), 1 + min(3, int(4 * strength))
        concept, tint = self.patches(drawn)
        segments = self.segments(scene, drawn, fault, severity, rng) if text else []
        return Example(np.asarray(picture).transpose(2, 0, 1), concept, tint, fault, severity, segments)

    def patches(self, drawn: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Class of the object that covers each patch: 0 nothing, -1 at an object's rim."""
        side = SIZE // self.patch
        centre = (np.arange(side) + 0.5) * self.patch
        concept, tint = np.zeros((side, side), np.int64), np.zeros((side, side), np.int64)
        for reach, mark in ((0.55, False), (0.42, True)):
            for box in drawn.boxes:
                group = drawn.groups[box.group]
                inside = (abs(centre[:, None] - box.y) < reach * box.side) & (abs(centre[None] - box.x) < reach * box.side)
                concept[inside] = CONCEPT_CLASSES.index(group.concept) if mark else -1
                tint[inside] = TINT_CLASSES.index(group.tint or "natural") if mark else -1
        return concept.ravel(), tint.ravel()

    def segments(self, scene: Scene, drawn: Scene, fault: int, severity: int, rng: random.Random) -> list[Any]:
        claims = [drawn]
        if drawn is not scene:
            claims.append(scene)
        while len(claims) < SEGMENTS:
            other = misread(drawn, rng) if rng.random() < 0.9 else sample_scene(rng, "train")
            other = replace(other, wording=int(rng.random() < 0.3))
            if other.split == "train" and not all(ok for _, _, ok in truths(other, drawn)):
                claims.append(other)
        rng.shuffle(claims)
        return [self.segment(claim, drawn, fault, severity) for claim in claims]

    def segment(self, claim: Scene, drawn: Scene, fault: int, severity: int) -> Any:
        """Token ids, next-token targets (-100: not taught), and (position, kind, holds) marks for the claim's words."""
        caption = self.words(claim.caption)
        facts = truths(claim, drawn)
        wrong = [(kind, group) for kind, group, ok in facts if ok is False]
        answer = self.words("yes")
        if wrong:
            kind, group = wrong[0]
            what = claim.background if kind == "background" else claim.groups[group].concept
            answer = self.words(f"no wrong {kind} {what}")
        named = []
        if fault == 0:
            named = self.words(". clean")
        elif fault > 0:
            named = self.words(f". {FAULT_WORDS[self.faults[fault - 1]]} {SEVERITIES[severity - 1]}")
        close, opening = self.ids["<|im_end|>"], [self.ids["<|im_start|>"], self.ids["assistant"]]
        ids = [*caption, close, *opening, *answer, *named, close]
        targets = [-100] * len(ids)
        n = len(caption)
        for i in range(len(ids) - 1):
            if (i < n - 1 and not wrong) or i >= n + 2:
                targets[i] = ids[i + 1]
        if not named:
            targets[-2] = -100
        marks, nouns, at = [], [], 0
        for group in claim.groups:
            noun = self.ids[group.concept if group.count == 1 else CONCEPTS[group.concept][1]]
            at = caption.index(noun, at) + 1
            nouns.append(at - 1)
        ground = caption.index(self.ids["background"]) - 1
        for kind, group, ok in facts:
            if ok is not None:
                marks.append((ground if kind == "background" else nouns[group], KINDS.index(kind), int(ok)))
        assert len(ids) <= SEGMENT, len(ids)
        return ids, targets, marks


# --- training --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Read-outs used only here: they hand the vision tower and the claim's words a target of their own."""

    def __init__(self, vision: int, hidden: int) -> None:
        super().__init__()
        self.concept = nn.Linear(vision, len(CONCEPT_CLASSES))
        self.tint = nn.Linear(vision, len(TINT_CLASSES))
        self.fault = nn.Linear(vision, 1 + len(FAULTS))
        self.severity = nn.Linear(vision, 1 + len(SEVERITIES))
        self.marks = nn.Linear(hidden, len(KINDS))


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


class Layout:
    """Where things stand in one packed row: the picture once, then segments that see it but not each other."""

    def __init__(self, ids: dict[str, int], image_tokens: int) -> None:
        self.prefix = [ids["<|im_start|>"], ids["user"], ids["<|vision_start|>"],
                       *[ids["<|image_pad|>"]] * image_tokens, ids["<|vision_end|>"]]  # fmt: skip
        self.pad = ids["<pad>"]
        n, side = len(self.prefix), int(image_tokens**0.5)
        length = n + SEGMENTS * SEGMENT
        where = torch.zeros(3, length, dtype=torch.long)
        where[:, :3] = torch.arange(3)
        rows = torch.arange(image_tokens)
        where[:, 3 : n - 1] = torch.stack([torch.full_like(rows, 3), 3 + rows // side, 3 + rows % side])
        where[:, n - 1] = 3 + side
        mask = torch.zeros(length, length, dtype=torch.bool)
        mask[:, :n] = True
        for s in range(SEGMENTS):
            part = slice(n + s * SEGMENT, n + (s + 1) * SEGMENT)
            where[:, part] = 4 + side + torch.arange(SEGMENT)
            mask[part, part] = True
        mask &= torch.ones_like(mask).tril()
        self.positions = where[:, None]
        self.mask = torch.where(mask, 0.0, -1e9)[None, None]

    def pack(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, L), next-token targets (B, L), marks (M, 4): row, position, kind, holds."""
        n = len(self.prefix)
        ids = torch.full((len(examples), self.positions.shape[-1]), self.pad)
        targets = torch.full_like(ids, -100)
        marks = []
        for row, example in enumerate(examples):
            ids[row, :n] = torch.tensor(self.prefix)
            for s, (words, aims, facts) in enumerate(example.segments):
                start = n + s * SEGMENT
                ids[row, start : start + len(words)] = torch.tensor(words)
                targets[row, start : start + len(words)] = torch.tensor(aims)
                marks += [(row, start + at, kind, ok) for at, kind, ok in facts]
        return ids, targets, torch.tensor(marks)


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
    ids, targets, marks = layout.pack(examples)
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
        examples.append(Example(np.asarray(picture).transpose(2, 0, 1), *teacher.patches(scene), -1, -1, segments))
    vision = model.config.vision_config
    side = SIZE // vision.patch_size
    right: dict[str, list[bool]] = {"true": []}
    for first in range(0, count, 64):
        part = examples[first : first + 64]
        pictures = torch.from_numpy(np.stack([e.picture for e in part]))
        rows = patch_pixels(pictures, patch=vision.patch_size, merge=vision.spatial_merge_size)
        seen = model.model.visual(rows, grid_thw=torch.tensor([[1, side, side]] * len(part))).pooler_output
        ids, targets, _ = layout.pack(part)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--see-steps", type=int, default=1200, help="vision tower alone, dense supervision")
    parser.add_argument("--steps", type=int, default=2400, help="all of it")
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
        both.load_state_dict(load_file(args.init), strict=False)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} words", flush=True)
    teacher = Teacher(tokenizer, patch=vision.patch_size)
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
        decay = [p for p in both.parameters() if p.ndim >= 2]
        rest = [p for p in both.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
                                      lr=args.lr, betas=(0.9, 0.98), fused=True)  # fmt: skip
        warm = 100
        stable = 0.85 if not text else 0.6
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s, steps=steps, stable=stable: min((s + 1) / warm, 1.0,
                                                    max(0.02, (1 - s / steps) / (1 - stable))))  # fmt: skip
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
            if text and (step % 300 == 299 or step == steps - 1):
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
        "matching_clean": figures["clean"], "matching_soft": figures["soft"], "see_steps": args.see_steps,
        "steps": args.steps, "batch": args.batch, "seed": args.seed, "seconds": round(time.time() - started),
    }  # fmt: skip
    (args.out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print(report)


if __name__ == "__main__":
    main()
