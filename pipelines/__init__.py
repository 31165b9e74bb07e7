"""Families of text-to-image pipelines. To add one: `pipelines/<family>.py` after `plugins.Pipeline`, and a row here."""

TABLE = {
    "flux": "rewardtune.pipelines.flux:Flux",
    "flux_2": "rewardtune.pipelines.flux_2:Flux2",
    "generic": "rewardtune.pipelines.generic:Generic",
    "lumina_2": "rewardtune.pipelines.lumina_2:Lumina2",
    "pixart_sigma": "rewardtune.pipelines.pixart_sigma:PixArtSigma",
    "qwen_image": "rewardtune.pipelines.qwen_image:QwenImage",
    "sana": "rewardtune.pipelines.sana:Sana",
    "stable_diffusion": "rewardtune.pipelines.stable_diffusion:StableDiffusion",
    "stable_diffusion_3": "rewardtune.pipelines.stable_diffusion_3:StableDiffusion3",
    "stable_diffusion_xl": "rewardtune.pipelines.stable_diffusion_xl:StableDiffusionXL",
    "z_image": "rewardtune.pipelines.z_image:ZImage",
}
