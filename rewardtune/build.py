"""Recipe -> objects: the only place where names become things and sections become plain arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rewardtune import gradients, registry
from rewardtune.data.records import read_captioned_images, read_prompts
from rewardtune.data.references import resolve, why_not_loaded
from rewardtune.diffusion import export, families, lora, offload
from rewardtune.diffusion.frozen_layers import keep_less
from rewardtune.diffusion.prompt_cache import PromptCache
from rewardtune.diffusion.rollout import sample
from rewardtune.diffusion.schedulers import check_deterministic, schedule
from rewardtune.errors import RecipeError
from rewardtune.guard.guard import Guard
from rewardtune.guard.verdict import rule_of
from rewardtune.guard.watch import Look, Watch
from rewardtune.plugins import AnyPipeline, Guidance, RewardCard, WholeRollout
from rewardtune.randomness import generator
from rewardtune.recipe.guard import GuardSection
from rewardtune.recipe.rewards import RewardSection
from rewardtune.recipe.sections import (
    DirectRewardRecipe,
    FullSection,
    LoraSection,
    PipelineSection,
    Recipe,
    RewardDanceRecipe,
    RewardGdsoRecipe,
    RewardOpdRecipe,
    RewardRisdRecipe,
    RewardSftRecipe,
    RolloutSection,
    SampleSection,
    SftRecipe,
)
from rewardtune.scoring import objective
from rewardtune.scoring.augment import Augmentation
from rewardtune.scoring.mixing import Mixing
from rewardtune.scoring.reward_set import Relative, RewardSet, Term, load_section
from rewardtune.tasks import Task
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.tasks.sft import NO_GUIDANCE, Sft
from rewardtune.training import runtime


def build_task(recipe: Recipe, *, device: str) -> Task:
    """Everything a recipe names, loaded and put together, ready for `train.train`."""
    if isinstance(recipe, RewardSftRecipe):
        from rewardtune.tasks.reward_sft import build_reward_sft

        return build_reward_sft(recipe, device=device)
    if isinstance(recipe, RewardGdsoRecipe):
        from rewardtune.tasks.reward_gdso import build_reward_gdso

        return build_reward_gdso(recipe, device=device)
    if isinstance(recipe, RewardRisdRecipe):
        from rewardtune.tasks.reward_risd import build_reward_risd

        return build_reward_risd(recipe, device=device)
    if isinstance(recipe, RewardOpdRecipe):
        from rewardtune.tasks.reward_opd import build_reward_opd

        return build_reward_opd(recipe, device=device)
    if isinstance(recipe, RewardDanceRecipe):
        from rewardtune.tasks.reward_dance import build_reward_dance

        return build_reward_dance(recipe, device=device)
    pipeline = load_pipeline(recipe.pipeline, device=device, trained=recipe.lora or recipe.full)
    if isinstance(recipe, SftRecipe) and isinstance(pipeline, WholeRollout):
        raise RecipeError(
            f"task sft needs single predictions and an encoder of images, and the family {pipeline.family!r} can only "
            f"run {type(pipeline.pipe).__name__} as a whole. Give the pipeline an adapter of its own "
            "(rewardtune/plugins.py), or train it with task: direct_reward."
        )
    trainable = _trainable(pipeline, recipe)
    if recipe.train.compile:
        denoiser: Any = pipeline.trainable[pipeline.denoiser]
        if not getattr(denoiser, "_repeated_blocks", None):
            raise RecipeError(
                f"train.compile: diffusers does not say which blocks of {type(denoiser).__name__} repeat. Leave it out."
            )
        denoiser.compile_repeated_blocks()
    samples = _sampler(pipeline, recipe.samples)
    exporter = _exporter(pipeline, recipe)
    if isinstance(recipe, SftRecipe):
        assert not isinstance(pipeline, WholeRollout)
        return Sft(
            pipeline,
            trainable=trainable,
            rows=read_captioned_images(recipe.data.manifest),
            size=pipeline.image_size,
            cache_latents=recipe.data.cache_latents,
            caption_dropout=recipe.data.caption_dropout,
            timestep_density=recipe.density,
            seed=recipe.train.seed,
            prompt_cache=_prompt_cache(pipeline, trainable, recipe, NO_GUIDANCE),
            samples=samples,
            export=exporter,
        )
    if not isinstance(pipeline, WholeRollout):  # which runs its denoiser again, and never its scheduler
        check_deterministic(pipeline.scheduler)
    flat = getattr(recipe.gradient, "memory", "flat") == "flat"
    if not recipe.train.compile:
        for part in pipeline.pipe.components.values():
            if isinstance(part, nn.Module):
                keep_less(part, recompute=flat)
    rollout = recipe.rollout
    guidance = Guidance(rollout.guidance, rollout.guidance_scale, rollout.negative_prompt, rollout.embedded_guidance)
    # what the pipeline refuses is told before a reward is loaded
    size, method = _size(pipeline, rollout), _method(pipeline, recipe, guidance)
    if not isinstance(pipeline, WholeRollout):
        schedule(pipeline, rollout.steps, size)
    return DirectReward(
        pipeline,
        trainable=trainable,
        prompts=read_prompts(recipe.data.prompts),
        rewards=RewardSet(
            [_trained_on(build_term(r, device=device)) for r in recipe.rewards], Mixing(**recipe.mixing.model_dump())
        ),
        method=method,
        balance=recipe.balance,
        velocity=recipe.regularise.velocity,
        sft=_mixed_sft(pipeline, trainable, recipe),
        num_steps=rollout.steps,
        guidance=guidance,
        size=size,
        sliced=recipe.pipeline.decode == "sliced",
        # a decoder that leaves for main memory after its work cannot be gone through backwards without coming back
        recompute_decoder=flat or recipe.pipeline.offload,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        augmentation=Augmentation(**recipe.augment.model_dump()) if recipe.augment else None,
        prompt_cache=_prompt_cache(pipeline, trainable, recipe, guidance),
        samples=samples,
        export=exporter,
    )


def _method(
    pipeline: AnyPipeline, recipe: DirectRewardRecipe, guidance: Guidance
) -> Callable[..., gradients.Finished | gradients.Choice]:
    """The way the gradient is taken, as `tasks.direct_reward` has it."""
    name, settings = recipe.gradient.method, recipe.gradient.model_dump(exclude={"method"})
    if isinstance(pipeline, WholeRollout):
        pipeline.call(guidance)  # says here, not in the first step, what it cannot do
        if recipe.regularise.velocity or recipe.regularise.sft:
            raise RecipeError(
                f"regularise needs single predictions, and the family {pipeline.family!r} runs "
                f"{type(pipeline.pipe).__name__} as a whole. Leave it out, or give the pipeline an adapter of its own."
            )
        return gradients.load_choice(name, **settings)
    return gradients.load_method(name, **settings)


def load_pipeline(
    section: PipelineSection, *, device: str, trained: LoraSection | FullSection | None = None
) -> AnyPipeline:
    """The adapter of a checkpoint's family, frozen, in the recipe's dtype on `device`.

    trained: what is to be trained. It is never offloaded, and whole modules stay fp32.
    """
    path, name, plugin = choose_family(section)
    try:
        config = plugin.Config(**section.options)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"pipeline.options do not fit the family {name!r}: {wrong}") from error
    mixed = section.dtype == "bfloat16" and isinstance(trained, FullSection)
    dtype = torch.float32 if section.dtype == "float32" or mixed else torch.bfloat16
    # parts that differ in dtype or place are made in main memory, so that the device never holds more than in the end
    apart = section.offload or mixed
    pipeline: AnyPipeline = plugin.load(
        path, config, revision=section.revision, dtype=dtype, device="cpu" if apart else device
    )
    pipeline.pipe.set_progress_bar_config(disable=True)
    runtime.set_attention(list(pipeline.trainable.values()), section.attention)
    names = (trained.modules if trained else None) or [pipeline.denoiser]
    for name, component in pipeline.pipe.components.items():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            if mixed and name not in names:
                component.to(torch.bfloat16)
    if section.offload:
        offload.apply(pipeline, device=device, stay={pipeline.denoiser, *names})
    elif apart:
        pipeline.pipe.to(device)
    _set_decoding(pipeline, section.decode)
    return pipeline


def _set_decoding(pipeline: AnyPipeline, how: str) -> None:
    """Let the autoencoder decode in parts. Raises RecipeError for one that cannot."""
    vae = getattr(pipeline.pipe, "vae", None)
    switch = {"whole": None, "sliced": "enable_slicing", "tiled": "enable_tiling"}[how]
    if switch is None:
        return
    try:
        getattr(vae, switch)()
    except (AttributeError, NotImplementedError) as error:
        raise RecipeError(
            f"pipeline.decode {how}: {type(vae).__name__} of {type(pipeline.pipe).__name__} cannot decode in parts. "
            "Leave it out."
        ) from error


def choose_family(section: PipelineSection) -> tuple[str, str, Any]:
    """(folder or hub id, family, its class) of a checkpoint, from its `model_index.json` alone.

    Raises RecipeError where there is no checkpoint, or none that a family takes.
    """
    path = resolve(section.model)
    name = section.family or find_family(path, section.revision)
    plugin = registry.pipelines.load_class(name)
    if section.family and hasattr(plugin, "refuses"):  # one that was found has seen the index
        why = families.refusal(name, plugin, read_model_index(path, section.revision))
        if why is not None:
            raise RecipeError(f"{why}.")
    return path, name, plugin


def find_family(path: str, revision: str | None) -> str:
    """The family that recognises a checkpoint's `model_index.json`."""
    index = read_model_index(path, revision)
    name = families.recognised(index)
    if name is None:
        raise RecipeError(f"{families.unrecognised(path, index)}.")
    return name


def read_model_index(path: str, revision: str | None) -> Mapping[str, Any]:
    """`model_index.json` of a folder or a hub id. Raises RecipeError where there is none."""
    if Path(path).is_dir():
        file = Path(path) / "model_index.json"
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(path, "model_index.json", revision=revision))
        except HFValidationError as error:
            raise RecipeError(
                f"pipeline.model {path!r}: there is no such folder, and the hub can have no such name: {error} "
                "Give a local folder, or owner/name of the hub."
            ) from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise RecipeError(
                f"pipeline.model {path!r} cannot be fetched from the hub: {why_not_loaded(error, path)} Check the "
                "name, the network and your token, or give a local folder."
            ) from error
    if not file.is_file():
        raise RecipeError(f"{path} holds no model_index.json, so it is not a diffusers pipeline. Give its top folder.")
    index: Mapping[str, Any] = json.loads(file.read_text())
    return index


def build_term(section: RewardSection, *, device: str) -> Term:
    """One reward of an objective."""
    reward = load_section(section, device=device)
    unknown = sorted(set(section.dimensions or ()) - set(reward.card.dimensions))
    if unknown:
        raise RecipeError(
            f"reward {section.name!r} has no dimension {', '.join(unknown)}; "
            f"it has: {', '.join(reward.card.dimensions) or 'none, so leave `dimensions:` out'}."
        )
    if section.dimensions is not None and not any(section.dimensions.values()):
        raise RecipeError(f"reward {section.name!r}: at least one dimension needs a weight other than zero.")
    if section.statistic is not None and not reward.card.dimensions:
        raise RecipeError(f"statistic needs a distributional reward; {reward.card.name!r} gives one number an image.")
    if section.relative is not None and not reward.card.needs_prompt:
        raise RecipeError(f"reward {section.name!r} reads no prompt, so `relative:` would compare equal values.")
    chosen = section.statistic
    settings = chosen.model_dump(exclude={"kind"}) if chosen else {}
    return Term(
        reward,
        section.weight,
        objective.statistic(chosen.kind, **settings) if chosen else objective.expectation,
        section.dimensions,
        section.ceiling,
        Relative(**section.relative.model_dump()) if section.relative else None,
        section.offset,
        section.batch_size,
    )


def _trained_on(term: Term) -> Term:
    """The same term. Raises RecipeError for a reward whose loaded card says that it has no gradient."""
    if not term.reward.card.differentiable:
        raise RecipeError(
            f"reward {term.name!r} returns no gradient ({term.reward.card.summary}), so task direct_reward cannot "
            "train on it; move it to compare.rewards or guard.rewards, where it judges the result."
        )
    return term


def _trainable(pipeline: AnyPipeline, recipe: SftRecipe | DirectRewardRecipe) -> dict[str, nn.Module]:
    """The modules that hold what is trained: adapters attached, or whole modules thawed."""
    section = recipe.lora or recipe.full
    assert section is not None
    names = section.modules or [pipeline.denoiser]
    unknown = [name for name in names if name not in pipeline.trainable]
    if unknown:
        raise RecipeError(
            f"{', '.join(unknown)} cannot be trained in the family {pipeline.family!r}; "
            f"it offers: {', '.join(pipeline.trainable)}."
        )
    modules = {name: pipeline.trainable[name] for name in names}
    if recipe.lora is not None:
        loadable = lora.loadable(pipeline)
        if not set(modules) <= set(loadable):
            raise RecipeError(
                f"adapters of {', '.join(loadable)} can be loaded for the family {pipeline.family!r}, so "
                f"lora.modules {list(modules)} could not be used afterwards. Leave the others out, or train them with "
                "`full:`."
            )
        targets = {name: recipe.lora.targets or pipeline.lora_targets[name] for name in modules}
        rank = recipe.lora.rank
        lora.attach(modules, rank=rank, alpha=recipe.lora.alpha or rank, targets=targets, seed=recipe.train.seed)
    else:
        for module in modules.values():
            module.requires_grad_(True)
    if recipe.train.gradient_checkpointing:
        for module in modules.values():
            # diffusers' models and transformers' models name it differently
            model: Any = module
            diffusers_name = getattr(module, "enable_gradient_checkpointing", None)
            (diffusers_name or model.gradient_checkpointing_enable)()
            module.train()
        vae: Any = getattr(pipeline.pipe, "vae", None)
        if isinstance(recipe, DirectRewardRecipe) and getattr(vae, "_supports_gradient_checkpointing", False):
            # the gradient runs through the decoder, whose activations at full size are the largest of all
            vae.enable_gradient_checkpointing()
    return modules


def build_guard(recipe: SftRecipe | DirectRewardRecipe, task: Any, folder: Path) -> Guard:
    """The guard of a run that writes into `folder`, watching the task's pipeline."""
    section = recipe.guard
    assert section is not None
    pipeline: AnyPipeline = task.pipeline
    direct = isinstance(recipe, DirectRewardRecipe)
    device = str(next(iter(pipeline.trainable[pipeline.denoiser].parameters())).device)
    watch = Watch(
        pipeline,
        prompts=read_prompts(section.prompts)[: section.num_prompts],
        seeds=section.seeds,
        held_out=[build_term(reward, device=device) for reward in section.rewards],
        trained=task.rewards if direct else None,
        num_steps=section.steps,
        guidance=Guidance("full", section.guidance_scale, embedded=section.embedded_guidance),
        size=_size(pipeline, recipe.rollout) if isinstance(recipe, DirectRewardRecipe) else pipeline.image_size,
        batch_size=section.batch_size,
    )
    return open_guard(section, folder, watch.look, [term.reward.card for term in watch.held_out])


def open_guard(
    section: GuardSection, folder: Path, look: Callable[[], Look], cards: Sequence[RewardCard] = ()
) -> Guard:
    """A guard by its section; `look` draws and scores, by the rewards of `cards`."""
    return Guard(look, rule_of(section), every=section.every, action=section.action, folder=folder, cards=cards)


def _mixed_sft(
    pipeline: AnyPipeline, trainable: Mapping[str, nn.Module], recipe: DirectRewardRecipe
) -> tuple[Sft, float] | None:
    section = recipe.regularise.sft
    if section is None:
        return None
    assert not isinstance(pipeline, WholeRollout)
    task = Sft(
        pipeline,
        trainable=trainable,
        rows=read_captioned_images(section.manifest),
        size=_size(pipeline, recipe.rollout),
        cache_latents=section.cache_latents,
        caption_dropout=section.caption_dropout,
        timestep_density=section.density,
        seed=recipe.train.seed,
        prompt_cache=_prompt_cache(pipeline, trainable, recipe, NO_GUIDANCE),
        samples=lambda: None,
        export=lambda *_: None,
    )
    return task, section.weight


def _prompt_cache(
    pipeline: AnyPipeline,
    trainable: Mapping[str, nn.Module],
    recipe: SftRecipe | DirectRewardRecipe,
    guidance: Guidance,
) -> PromptCache | None:
    """None where embeddings change with the training, or where the family has no way to put batches together."""
    if isinstance(pipeline, WholeRollout) or set(trainable) - {pipeline.denoiser} or not hasattr(pipeline, "join"):
        return None
    # text encoders that wait in main memory come once, for all prompts of the run
    end = recipe.train.steps * recipe.train.batch_size if recipe.pipeline.offload else 0
    return PromptCache(pipeline, guidance, limit=int(recipe.pipeline.prompt_cache * 2**30), end=end)


def _size(pipeline: AnyPipeline, rollout: RolloutSection) -> tuple[int, int]:
    """Height and width of a roll-out. Raises RecipeError for a size that the family refuses or rounds."""
    size = (rollout.height or pipeline.image_size[0], rollout.width or pipeline.image_size[1])
    for side, pixels in zip(("height", "width"), size, strict=True):
        if why := families.misfit(side, pixels, family=pipeline.family, multiple=pipeline.size_multiple):
            raise RecipeError(f"{why}.")
    return size


def _sampler(pipeline: AnyPipeline, section: SampleSection) -> Callable[[], Tensor | None]:
    def samples() -> Tensor | None:
        if not section.prompts:
            return None
        generators = [generator(section.seed, "samples", i) for i in range(len(section.prompts))]
        guidance = Guidance("full", section.guidance_scale, embedded=section.embedded_guidance)
        return sample(pipeline, section.prompts, generators, num_steps=section.steps, guidance=guidance)

    return samples


def _exporter(
    pipeline: AnyPipeline, recipe: SftRecipe | DirectRewardRecipe
) -> Callable[[Path, Mapping[str, str]], None]:
    base, revision = recipe.pipeline.model, recipe.pipeline.revision

    def run(folder: Path, provenance: Mapping[str, str]) -> None:
        if recipe.lora is not None:
            modules = recipe.lora.modules or [pipeline.denoiser]
            export.lora(pipeline, modules, folder, provenance, base=base, revision=revision)
        else:
            export.pipeline(pipeline, folder, provenance, base=base, revision=revision)

    return run
