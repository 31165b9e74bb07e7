"""Families of text-to-image pipelines. To add one: `pipelines/<family>.py` after `plugins.Pipeline`, and a row here."""

TABLE = {
    "flux": "rewardtune.pipelines.flux:Flux",
    "flux_2": "rewardtune.pipelines.flux_2:Flux2",
    "qwen_image": "rewardtune.pipelines.qwen_image:QwenImage",
    "stable_diffusion": "rewardtune.pipelines.stable_diffusion:StableDiffusion",
    "z_image": "rewardtune.pipelines.z_image:ZImage",
}
