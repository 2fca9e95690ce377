"""One reader a module, each run in a fresh process: ``python -m benchmarks.restoring.readers.NAME TASK``."""
