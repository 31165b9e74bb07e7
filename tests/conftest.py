"""Options of the test suite, and one thread a process where several run it."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # before torch is imported, and for the processes that tests start: threads that share a core wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--write-pages", action="store_true", help="renew pages of docs/ that tests generate")
