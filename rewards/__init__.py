"""Rewards. To add one: write `rewards/<name>.py` after `plugins.Reward` (no torch at module level), add a row here."""

TABLE = {
    "pocket-oracle": "rewardtune.rewards.pocket_oracle:PocketOracle",
    "zreward": "rewardtune.rewards.zreward:ZReward",
}
