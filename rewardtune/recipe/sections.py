"""What a recipe may say: one class per section, one recipe class per task. No torch here.

Reading files, overrides and error messages are `file.py`'s; turning a recipe into objects is `build.py`'s.
Every default that no paper gives is ours; the docs say so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from rewardtune.recipe.gradients import GradientSection, steps_needed
from rewardtune.recipe.guard import GuardSection
from rewardtune.recipe.rewards import MixingSection, RewardSection, Sum
from rewardtune.recipe.section import Device, Fraction, Positive, Section

R = TypeVar("R", "SftRecipe", "DirectRewardRecipe")


class PipelineSection(Section):
    """The diffusers text-to-image pipeline to finetune."""

    model: str
    """Hub id, local folder, or `pocket:pipeline`."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    family: str | None = None
    """Name in `pipelines list`; found from the checkpoint's `model_index.json` when left out."""
    attention: str = "native"
    """Attention backend: native, xformers, flash, ... (diffusers' names)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; what is trained is float32 in either case."""
    offload: bool = False
    """Keep frozen text encoders and the autoencoder in main memory, and on the device only while they work."""
    prompt_cache: Annotated[float, Field(ge=0.0)] = 4.0
    """GiB of main memory in which a process keeps embeddings of training prompts, so that frozen text encoders run once
    a prompt (ours); 0 keeps none. No number of the training depends on it."""
    decode: Literal["whole", "sliced", "tiled"] = "whole"
    """How the autoencoder turns latents into images: a batch at once, image by image, or in overlapping tiles."""
    options: dict[str, Any] = {}
    """Options of the family's adapter."""


class LoraSection(Section):
    """Low-rank adapters (peft)."""

    rank: Positive = 16
    """Rank of the adapters' matrices (ours)."""
    alpha: Positive | None = None
    """What the adapters do counts alpha / rank times. `rank` when left out, so that the file needs no metadata to load
    at the right strength."""
    modules: list[str] | None = None
    """Trainable modules of the pipeline that get adapters; its denoiser when left out."""
    targets: list[str] | None = None
    """Names of linear layers; the family's own list when left out."""


class FullSection(Section):
    """Train whole modules instead of adapters."""

    modules: list[str] | None = None
    """Its denoiser when left out."""


class PromptSection(Section):
    """Where prompts come from."""

    prompts: str
    """A .txt file (one prompt a line), a .jsonl file (`prompt` and optional metadata), or `pocket:prompts/<split>`."""


class CaptionedImageSection(Section):
    """Captioned images: a .jsonl or .parquet manifest with `image` (path beside it) and `caption`."""

    manifest: str
    """Path of the manifest."""
    cache_latents: bool = True
    """Encode every image once at the start and keep the latents in memory."""
    caption_dropout: Fraction = 0.1
    """Share of captions replaced by the empty one, which classifier-free guidance needs."""


class PreferenceSection(Section):
    """Preference records (docs/data.md): same-prompt groups with scores, annotators' scores, or preferences."""

    records: str
    """Records to train on, .jsonl or .parquet."""
    held_out: str | None = None
    """Records that `evaluate` reads at the end."""


class JudgedImageSection(Section):
    """Pictures with prompts for a teacher to judge: preference records, whose labels are not used, or rows without."""

    images: str
    """Records or rows with `prompt` and `image`, .jsonl or .parquet."""
    held_out: str | None = None
    """Rated records that `evaluate` reads at the end."""


class RolloutSection(Section):
    """How images are sampled during training."""

    steps: Positive = 20
    """Denoising steps."""
    guidance: Literal["full", "detached-negative", "off"] = "detached-negative"
    """Classifier-free guidance under gradient: through both branches, the positive one only, or none at all."""
    guidance_scale: Annotated[float, Field(ge=0.0)] = 4.0
    """In the meaning of the family's own pipeline."""
    embedded_guidance: Annotated[float, Field(ge=0.0)] | None = None
    """Guidance that a distilled denoiser takes as an input, as FLUX does; the family's own default when left out."""
    negative_prompt: str = ""
    """Of every image; used by guidance other than `off`."""
    height: Positive | None = None
    """Pixels; the family's own size when left out. Must be a multiple that the family names."""
    width: Positive | None = None
    """Pixels, like `height`."""


class AugmentSection(Section):
    """Views of each image over which the rewards' gradient is averaged, so that no single pixel grid is fitted."""

    copies: Positive = 3
    """Views of each image, each scored (ours): the reward's time and memory grow with it."""
    shift: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.06
    """Largest move either way, as a share of the image's shorter side (ours)."""
    noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.04
    """Standard deviation of Gaussian noise on pixels in [0, 1] (ours)."""


class MixedSftSection(CaptionedImageSection):
    """SFT on captioned images beside the reward, as ReFL's pre-training loss (arXiv 2304.05977, Eq. 5)."""

    weight: Annotated[float, Field(gt=0.0)]
    """Factor of the denoising loss that is added to the reward's loss."""
    density: Literal["uniform", "logit-normal", "mode"] = "logit-normal"
    """Timestep density, as `density` of task sft."""


class RegulariseSection(Section):
    """What holds the model to its start while a reward pulls."""

    velocity: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the mean squared distance between the denoiser's prediction and that of the frozen start, at one random
    step of each roll-out. For flow matching this is the KL between the two samplers up to the step's weight."""
    sft: MixedSftSection | None = None
    """SFT on captioned images beside the reward; none when left out."""


class SeenSection(Section):
    """How large a vision-language model sees pictures."""

    min_pixels: Positive | None = None
    """Least area of a picture; smaller ones are made larger, their shape kept. The checkpoint's own when left out."""
    max_pixels: Positive | None = None
    """Most area of a picture; larger ones are made smaller, their shape kept. This is the budget of image tokens: in
    Qwen3.5 one stands for 32 x 32 pixels, so that 1048576 are 1,024 tokens. Left out: what the checkpoint was trained
    with here, which its export keeps; of other checkpoints their own, at most 1,024 tokens (ours)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self


class ScorerSection(SeenSection):
    """The vision-language model that becomes a reward."""

    model: str
    """Hub id, local folder, a scorer's export, or `pocket:scorer-base`."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    rubric: str | None = None
    """`rubric.json`; the checkpoint's own, or the shipped one, when left out. May be another than the checkpoint's own:
    training makes it fit."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; what is trained is float32 in either case."""
    lora: LoraSection | None = None
    """Adapters; the whole model is trained when left out."""


class ServerSection(Section):
    """An OpenAI-compatible server, such as `vllm serve`."""

    url: str
    """Up to and including /v1."""
    key_variable: str | None = None
    """Name of the environment variable that holds the key; none is sent when left out."""
    timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds for one request, the whole reasoning included (ours)."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts after a failed request, with growing pauses (ours)."""
    concurrency: Positive = 16
    """Requests under way at once (ours)."""


class TeacherSection(SeenSection):
    """The frozen scorer that a student learns from."""

    model: str
    """Hub id, local folder, or a scorer's export; with `server` its name there."""
    server: ServerSection | None = None
    """Where the teacher runs; in this process when left out."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    rubric: str | None = None
    """`rubric.json`; the checkpoint's own, or the shipped one, when left out. Its dimensions and the values of its
    levels must be the student's; its prompts and tokens need not be."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its weights, where it runs in this process."""
    traces: Annotated[int, Field(ge=0)] = 1
    """K, reasoned judgements of each picture and dimension; 0 reads the teacher in one pass (a control)."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Of sampling the reasoning; 0 takes the likeliest token."""
    max_tokens: Positive | None = None
    """Most tokens of a reasoning; the rubric's own bound when left out."""
    cache: str | None = None
    """Folder in which the judgements are kept: drawn once, continued after an interruption. Left out: drawn live."""
    batch_size: Positive = 8
    """Pictures that are judged at a time while the cache is filled (ours). In this process their traces are written
    together, and an interruption loses them; what a server answers is kept picture by picture."""

    @model_validator(mode="after")
    def _fits(self) -> TeacherSection:
        if self.server is not None and self.traces == 0:
            raise ValueError("a teacher on a server is asked to reason; set traces to 1 or more")
        if self.server is not None and self.cache is None:
            raise ValueError("a teacher on a server needs `cache`, a folder for its judgements: drawn live, every "
                             "optimiser step would wait for the network")  # fmt: skip
        if self.server is not None and (self.min_pixels is not None or self.max_pixels is not None):
            raise ValueError("a server cuts pictures itself, by the preprocessor_config.json of what it serves, where "
                             "an export keeps its bounds; leave min_pixels and max_pixels out, or set them there with "
                             "--mm-processor-kwargs")  # fmt: skip
        return self


class ViewedSection(Section):
    """What a one-pass scorer sees of a picture while it is trained."""

    shift: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Largest move of a picture either way, as a share of its shorter side, each time the scorer sees it: a judgement
    is of the picture, not of where its pixels lie (ours)."""
    noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Gaussian noise on the pixels, in [0, 1], each time the scorer sees a picture: standard deviations drawn evenly
    from 0 to this. A reward whose gradient is taken through noisy views (`augment`) should have seen some (ours)."""


class RisdSection(ViewedSection):
    """RISD (Z-Reward, arXiv 2606.09076, Eq. 15), and controls that the paper lacks."""

    match: Literal["distribution", "mean"] = "distribution"
    """Forward KL over the levels; or the squared error of the expected score alone (a control)."""
    labels: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of a cross-entropy on the records' own scores beside it (a control)."""


class OpdSection(Section):
    """On-policy distillation (Z-Reward, Eq. 18 and 19): the student reasons, the teacher rates each of its tokens."""

    samples: Positive = 4
    """Traces of each picture and dimension (ours)."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of sampling the traces."""
    max_tokens: Positive | None = None
    """Most tokens of a reasoning; the rubric's own bound when left out."""


class DanceSection(Section):
    """RewardDance: the answer first, an explanation after it, cross-entropy on both."""

    form: Literal["pointwise", "pairwise"] = "pointwise"
    """Scores of one picture, as Z-Reward's baseline; or whether a picture is better than another (arXiv 2509.08826)."""
    target: Literal["hard", "two-hot", "histogram"] = "hard"
    """Of the scores; the pairwise form has yes and no."""
    explanation: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the explanation's mean cross-entropy a token (ours); rows without a critique have none."""
    preferences_in: str | None = None
    """Dimension that preferences without scores are about, in the pairwise form."""

    @model_validator(mode="after")
    def _fits(self) -> DanceSection:
        if self.form == "pairwise" and self.target != "hard":
            raise ValueError(f"target {self.target} is about scores, and the pairwise form learns yes and no; leave "
                             "target out, or set form to pointwise")  # fmt: skip
        if self.form == "pointwise" and self.preferences_in is not None:
            raise ValueError("the pointwise form learns from scores and reads no preferences; leave preferences_in "
                             "out, or set form to pairwise")  # fmt: skip
        return self


class SftTargetSection(ViewedSection):
    """Supervised training of the scorer's distribution."""

    target: Literal["hard", "two-hot", "histogram"] = "two-hot"
    """One-hot nearest level; mass on the two neighbouring levels so that the mean is the label; or the annotators'."""


class RemoteRolloutSection(Section):
    """Roll-outs on a vLLM server that loads adapters at run time (docs/train-a-reward.md)."""

    server: ServerSection
    """A vLLM server that serves `scorer.model`."""
    adapters: str
    """Folder of this run's own, seen by trainer and server under the same path, through which the weights go."""


class GdsoSection(Section):
    """GDSO (Z-Reward, arXiv 2606.09076, section 4). The paper gives no values: every default here is ours."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """G, reasoned judgements of each picture of a pair."""
    policy: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the policy gradient; 0 leaves the direct losses on sampled reasoning."""
    pointwise_reward: Annotated[float, Field(ge=0.0)] = 1.0
    """Lambda of the distance to the human score (Eq. 7, 13)."""
    pairwise_reward: Annotated[float, Field(ge=0.0)] = 1.0
    """Lambda of the distance to the human gap (Eq. 10, 13)."""
    pointwise_loss: Annotated[float, Field(ge=0.0)] = 0.5
    """Alpha of the cross-entropy on every sample's distribution (Eq. 8, 14); with both at 0 this is GRPO."""
    pairwise_loss: Annotated[float, Field(ge=0.0)] = 0.5
    """Alpha of the gap loss over all G x G pairs (Eq. 11, 14)."""
    kl: Annotated[float, Field(ge=0.0)] = 0.01
    """Beta of the KL to the reference (Eq. 4)."""
    reference_every: Positive = 100
    """Optimiser steps after which the reference becomes the policy of the moment (Algorithm 1)."""
    reward: Literal["expectation", "parsed"] = "expectation"
    """What is rewarded: the distribution's mean, or the score as it stands in the text (the paper's ablation a)."""
    target: Literal["hard", "two-hot", "histogram"] = "hard"
    """Target of the cross-entropy; Eq. 8 is `hard`."""
    updates_per_rollout: Positive = 1
    """Optimiser steps on the same traces; more than one needs `clip`."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """PPO's bound on the probability ratio; Eq. 4 has none."""
    length: Literal["sum", "mean"] = "sum"
    """Whether a trace's tokens add up, as in Eq. 4, or count by their mean, as in trl's `grpo` loss."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of sampling."""
    max_tokens: Positive | None = None
    """Most tokens of a reasoning; the rubric's own bound when left out."""
    preferences_in: str | None = None
    """Dimension that preferences without scores are about."""
    rollouts: RemoteRolloutSection | None = None
    """Where traces are sampled; in this process when left out. With `scorer.lora` only."""

    @model_validator(mode="after")
    def _fits(self) -> GdsoSection:
        if self.updates_per_rollout > 1 and self.clip is None:
            raise ValueError("updates_per_rollout above 1 needs `clip`: the traces are no longer the policy's own")
        if not (self.policy or self.pointwise_loss or self.pairwise_loss):
            raise ValueError("nothing to learn from: policy, pointwise_loss and pairwise_loss are all 0")
        return self


class OptimizerSection(Section):
    """Optimiser and learning-rate schedule."""

    name: str = "adamw"
    """adamw, muon (for the matrices of blocks), or if installed: adamw8bit (bitsandbytes), prodigy (prodigyopt)."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    """Learning rate, at the end of the warm-up (ours)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two running means (torch's defaults)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled, as in AdamW."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator of AdamW's update (torch's default)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up the learning rate stays, or falls to 0 by the last step (diffusers' `get_scheduler`)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps over which the learning rate rises from 0."""


class TrainSection(Section):
    """The loop's own numbers."""

    steps: Positive
    """Optimiser steps."""
    batch_size: Positive = 1
    """Samples of one optimiser step, over all processes and accumulated micro-batches."""
    accumulation: Positive = 1
    """Micro-batches a process splits its share into."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic: `bf16` is autocast to bfloat16, beside which what is trained stays float32."""
    seed: int = 0
    """Of everything that the training draws: order, noise, adapters' start."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Norm to which each optimiser step's gradient is clipped (ours)."""
    max_consecutive_skips: Annotated[int, Field(ge=0)] = 5
    """Optimiser steps in a row that may be skipped for non-finite values."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Exponential moving average over the trained tensors; exported instead of them when given."""
    gradient_checkpointing: bool = False
    """Recompute activations on the way back, of the trained modules and of the decoder that a reward's gradient goes
    through: less memory, more time."""
    shard: bool = False
    """Split the trained modules' parameters, gradients and optimiser state over all processes (FSDP2)."""
    compile: bool = False
    """torch.compile the denoiser's repeated blocks: minutes of start-up, then faster steps."""
    device: Device | None = None
    """cpu, cuda, cuda:1, mps; the best one there is when left out."""

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation} equal micro-batches; "
                "make batch_size a multiple of accumulation"
            )
        if self.shard and self.compile:
            raise ValueError(
                "train.shard and train.compile exclude each other: weights are gathered between the blocks"
            )
        return self


class CheckpointSection(Section):
    """When to save, and how much to keep."""

    every: Positive = 100
    """Optimiser steps between checkpoints; the last step always has one (ours)."""
    keep: Positive = 2
    """How many of the newest stay on disk (ours)."""


class TrackSection(Section):
    """Where numbers go beside metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: nothing, files in the run folder that `wandb sync` sends later, or live."""
    project: str = "rewardtune"
    """Its project in wandb."""
    tensorboard: bool = False
    """Write TensorBoard's files into the run folder's `tensorboard/`; needs the extra `tensorboard`."""


class SampleSection(Section):
    """Fixed prompts and seeds drawn over time."""

    prompts: list[str] = []
    """One image each, in one picture: `samples/step-*.png` of the run folder. None are drawn when empty."""
    seed: int = 0
    """Of the images' noise."""
    every: Positive = 100
    """Optimiser steps between pictures (ours); start and end are always drawn."""
    steps: Positive = 20
    """Denoising steps (ours)."""
    guidance_scale: Annotated[float, Field(ge=0.0)] = 4.0
    """Classifier-free guidance, in the meaning of the family's own pipeline (ours)."""
    embedded_guidance: Annotated[float, Field(ge=0.0)] | None = None
    """Guidance that a distilled denoiser takes as an input; the family's own default when left out."""


class CompareSection(Section):
    """What `rewardtune compare` uses for this recipe when the command line names nothing else."""

    prompts: str | None = None
    """Prompts to compare on, as `data.prompts`, and not those trained on; `--prompts` when left out."""
    num_prompts: Positive | None = None
    """Use only the first so many prompts of the file."""
    seeds: Positive = 2
    """Images of each prompt; diversity needs two."""
    rewards: list[RewardSection] = []
    """The panel that scores every side, beside what the sides were trained on."""
    judge: str | None = None
    """Whose verdict the headline is: a reward's name, or NAME:option=value. When left out: the panel's first that says
    it is held out and that no side was trained on, else its first not trained on."""
    steps: Positive = 20
    """Denoising steps (ours)."""
    guidance_scale: Annotated[float, Field(ge=0.0)] = 4.0
    """Classifier-free guidance, in the meaning of the family's own pipeline (ours)."""
    embedded_guidance: Annotated[float, Field(ge=0.0)] | None = None
    """Guidance that a distilled denoiser takes as an input; the family's own default when left out."""
    batch_size: Positive = 4
    """Images drawn at a time (ours)."""


class _Recipe(Section):
    """What every recipe has."""

    name: str | None = None
    """Run name; the file's name when left out."""
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.train.shard and self.optimizer.name != "adamw":
            raise ValueError(f"optimizer.name {self.optimizer.name} needs whole matrices; train.shard works with adamw")
        return self


class SftRecipe(_Recipe):
    """Diffusion finetuning on captioned images."""

    task: Literal["sft"]
    pipeline: PipelineSection
    lora: LoraSection | None = None
    """Train adapters: this or `full`, one of them."""
    full: FullSection | None = None
    """Train whole modules: this or `lora`, one of them."""
    data: CaptionedImageSection
    density: Literal["uniform", "logit-normal", "mode"] = "logit-normal"
    """Timestep density (Stable Diffusion 3, arXiv 2403.03206, section 3.1)."""
    guard: GuardSection | None = None
    samples: SampleSection = SampleSection()
    compare: CompareSection = CompareSection()

    @model_validator(mode="after")
    def _one_way(self) -> SftRecipe:
        return _adapters_or_full(self)


class DirectRewardRecipe(_Recipe):
    """Back-propagate rewards through the sampling chain."""

    task: Literal["direct_reward"]
    pipeline: PipelineSection
    lora: LoraSection | None = None
    """Train adapters: this or `full`, one of them."""
    full: FullSection | None = None
    """Train whole modules: this or `lora`, one of them."""
    data: PromptSection
    """Prompts to draw images of."""
    rollout: RolloutSection = RolloutSection()
    gradient: GradientSection
    """How far back, and along which path, the reward's gradient goes (docs/gradients.md)."""
    rewards: Annotated[list[RewardSection], Field(min_length=1)]
    """What is maximised: one reward or several."""
    balance: Literal["value", "gradient"] = "value"
    """How several rewards' weights are meant: of their values, each divided by its card's scale; or of their gradients
    at the image, each divided by its norm over the batch, which every micro-batch estimates from its own images: no
    reward drowns another."""
    mixing: MixingSection = Sum()
    """How several rewards become one number an image (docs/rewards.md)."""
    regularise: RegulariseSection = RegulariseSection()
    augment: AugmentSection | None = None
    guard: GuardSection | None = None
    samples: SampleSection = SampleSection()
    compare: CompareSection = CompareSection()

    @model_validator(mode="after")
    def _one_way(self) -> DirectRewardRecipe:
        field, least = steps_needed(self.gradient)
        if least > self.rollout.steps:
            value = getattr(self.gradient, field)
            beyond = "exceeds" if least == value else f"needs {least} steps, more than"
            hint = "; write `all` for the full chain" if field == "last_steps" else ""
            raise ValueError(f"gradient.{field} {value} {beyond} rollout.steps {self.rollout.steps}{hint}")
        if self.regularise.velocity and self.lora is None:
            raise ValueError(
                "regularise.velocity compares with the frozen start, which adapters keep beside them; train with "
                "`lora:`, or leave it out"
            )
        if self.mixing.kind != "sum":
            if len(self.rewards) < 2:
                raise ValueError(f"mixing {self.mixing.kind} is of several rewards, and there is one; leave mixing out")
            if self.balance == "gradient":
                raise ValueError(
                    f"balance: gradient weighs the gradients of a sum, and mixing is {self.mixing.kind}; leave one out"
                )
            if any(reward.weight <= 0 for reward in self.rewards):
                raise ValueError(
                    f"mixing {self.mixing.kind} compares weight * (value - offset) / scale of the rewards, so weights "
                    "must be above 0"
                )
        trained = {(reward.name, repr(reward.options)) for reward in self.rewards}
        for reward in self.guard.rewards if self.guard else []:
            if (reward.name, repr(reward.options)) in trained:
                raise ValueError(
                    f"guard.rewards names {reward.name}, which is trained on; a reward that is fooled does not notice. "
                    "Name one that is not among rewards"
                )
        return _adapters_or_full(self)


class RewardSftRecipe(_Recipe):
    """Supervised training of a scorer's distribution."""

    task: Literal["reward_sft"]
    scorer: ScorerSection
    data: PreferenceSection
    objective: SftTargetSection = SftTargetSection()


class RewardGdsoRecipe(_Recipe):
    """Group-wise direct score optimisation of a reasoning scorer, or GRPO."""

    task: Literal["reward_gdso"]
    scorer: ScorerSection
    data: PreferenceSection
    objective: GdsoSection = GdsoSection()

    @model_validator(mode="after")
    def _servable(self) -> RewardGdsoRecipe:
        if self.objective.rollouts is not None and self.scorer.lora is None:
            raise ValueError(
                "objective.rollouts needs scorer.lora: at every roll-out the server is given the weights anew, and "
                "adapters are what a vLLM server loads while it runs. Add `lora` to scorer, or leave rollouts out"
            )
        return self


class RewardRisdRecipe(_Recipe):
    """Distil a teacher's reasoned score distributions into a student that scores in one pass."""

    task: Literal["reward_risd"]
    scorer: ScorerSection
    teacher: TeacherSection
    data: JudgedImageSection
    objective: RisdSection = RisdSection()


class RewardOpdRecipe(_Recipe):
    """On-policy distillation of a teacher's reasoning."""

    task: Literal["reward_opd"]
    scorer: ScorerSection
    teacher: TeacherSection
    data: JudgedImageSection
    objective: OpdSection = OpdSection()


class RewardDanceRecipe(_Recipe):
    """Supervised training of a score, or of which picture is better, and of the explanation after it."""

    task: Literal["reward_dance"]
    scorer: ScorerSection
    data: PreferenceSection
    objective: DanceSection = DanceSection()


Recipe = Annotated[
    SftRecipe
    | DirectRewardRecipe
    | RewardSftRecipe
    | RewardGdsoRecipe
    | RewardRisdRecipe
    | RewardOpdRecipe
    | RewardDanceRecipe,
    Field(discriminator="task"),
]
TASKS = {
    "sft": SftRecipe,
    "direct_reward": DirectRewardRecipe,
    "reward_sft": RewardSftRecipe,
    "reward_gdso": RewardGdsoRecipe,
    "reward_risd": RewardRisdRecipe,
    "reward_opd": RewardOpdRecipe,
    "reward_dance": RewardDanceRecipe,
}


def _adapters_or_full(recipe: R) -> R:
    if (recipe.lora is None) == (recipe.full is None):
        raise ValueError("name one of `lora:` (adapters) and `full:` (whole modules)")
    if recipe.full is not None and recipe.pipeline.dtype == "bfloat16" and recipe.train.precision != "bf16":
        raise ValueError(
            "pipeline.dtype bfloat16 beside `full:`, whose modules are float32, needs train.precision bf16, which lets "
            "the two compute together"
        )
    return recipe
