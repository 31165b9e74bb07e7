"""`python -m rewardtune` is the console script."""

from rewardtune.cli.app import main

main()
