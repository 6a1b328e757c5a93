"""These are a user's programs, not test modules: they are read and run by ``test_betty_programs.py``."""

collect_ignore_glob = ["*"]
