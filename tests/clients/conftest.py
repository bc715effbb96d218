"""These tests are for an environment of their own: ``make test-clients``."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("captum") else ["test_*.py"]
