"""Families of text-to-image pipelines. To add one: write `pipelines/<family>.py` after `plugins.Pipeline`, add a row."""

TABLE = {
    "z_image": "rewardtune.pipelines.z_image:ZImage",
}
