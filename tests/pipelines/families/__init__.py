"""One family a file; see parity.py."""
