"""HTTP, both ways: one line to a server that others run, and a reward of ours behind an address."""
