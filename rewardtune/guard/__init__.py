"""Guard against over-optimisation: looks at fixed prompts and seeds by rewards that are not trained on.

`watch.py` draws and scores (a `Look`); `verdict.py` decides from the looks so far; `guard.py` keeps them in the run
folder and holds the weights of the best one. `training/loop.py` asks it, and knows none of this.
"""
