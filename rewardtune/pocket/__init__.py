"""The pocket world: a small, complete stand-in for real data that ships with rewardtune."""
