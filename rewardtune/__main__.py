"""`python -m rewardtune` is the console script."""

from rewardtune.cli import main

main()
