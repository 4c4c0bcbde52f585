"""What `jobs/bench.py` measures: a module for each sub-command, with `Config` and `run`."""
