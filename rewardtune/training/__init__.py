"""The loop that knows no algorithm, and what surrounds it: runs, checkpoints, processes, tracking."""
