"""Rewards at work: a weighted set of them, what is maximised, their contract, and `rewardtune score`."""
