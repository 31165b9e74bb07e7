"""One reward a file; see backend.py."""
