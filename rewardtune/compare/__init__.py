"""`rewardtune compare`: same prompts, same seeds, several sides; sampled, scored, put into numbers and onto one page.

Flow: `sides.py` -> `sampling.py` (images) -> `scores.py` -> `report.py` (with `statistics.py`, `diversity.py`,
`votes.py`) -> `page.py`; `run.py` drives it. Each stage writes a file that the next one reads.
"""
