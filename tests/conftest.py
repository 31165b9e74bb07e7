"""Options of the test suite."""


def pytest_addoption(parser):
    parser.addoption("--write-pages", action="store_true", help="renew pages of docs/ that tests generate")
