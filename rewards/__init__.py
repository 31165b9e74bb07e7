"""Rewards. To add one: write `rewards/<name>.py` after `plugins.Reward` (no torch at module level), add a row here."""

TABLE = {
    "aesthetic": "rewardtune.rewards.aesthetic:Aesthetic",
    "clipscore": "rewardtune.rewards.clipscore:ClipScore",
    "detection-counts": "rewardtune.rewards.detection_counts:DetectionCounts",
    "hpsv2": "rewardtune.rewards.hpsv2:HpsV2",
    "hpsv3": "rewardtune.rewards.hpsv3:HPSv3",
    "http-judge": "rewardtune.rewards.http_judge:HttpJudge",
    "imagereward": "rewardtune.rewards.imagereward:ImageReward",
    "jpeg-size": "rewardtune.rewards.jpeg_size:JpegSize",
    "ocr": "rewardtune.rewards.ocr:Ocr",
    "ocr-edit-distance": "rewardtune.rewards.ocr_edit_distance:OcrEditDistance",
    "pickscore": "rewardtune.rewards.pickscore:PickScore",
    "pocket-oracle": "rewardtune.rewards.pocket_oracle:PocketOracle",
    "qrealign": "rewardtune.rewards.qrealign:QReAlign",
    "remote": "rewardtune.rewards.remote:Remote",
    "rewarddance": "rewardtune.rewards.rewarddance:RewardDance",
    "vqascore": "rewardtune.rewards.vqascore:VQAScore",
    "zreward": "rewardtune.rewards.zreward:ZReward",
}
