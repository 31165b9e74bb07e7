"""Families of text-to-image pipelines. To add one: `pipelines/<family>.py` after `plugins.Pipeline`, and a row here."""

TABLE = {
    "generic": "rewardtune.pipelines.generic:Generic",
    "lumina_2": "rewardtune.pipelines.lumina_2:Lumina2",
    "sana": "rewardtune.pipelines.sana:Sana",
    "stable_diffusion": "rewardtune.pipelines.stable_diffusion:StableDiffusion",
    "z_image": "rewardtune.pipelines.z_image:ZImage",
}
