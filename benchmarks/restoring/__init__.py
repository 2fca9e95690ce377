"""The parts of ``benchmarks/restore.py``: the model, its server and links, the readers, and what is made of their times."""
