"""SIGTERM is heard by the process that serves, and ends the processes that a handler forks."""

from __future__ import annotations

from tests.starts import Project

FORKS = """
import json, os, signal, time
from coldstart.adapters.signals import on_sigterm

heard, ends = [], []
with on_sigterm(lambda: heard.append(1)):
    for _ in range(50):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)  # at once: it may not have come back from its fork yet
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os.kill(os.getpid(), signal.SIGTERM)
print(json.dumps({"heard": len(heard), "ends": sorted(set(ends))}))
"""


def test_forked_children_die_of_sigterm(tmp_path):
    """A child dies of SIGTERM, however early it comes: ``multiprocessing.Pool`` waits for those that it terminated."""
    project = Project(tmp_path)
    project.write(FORKS, "forks.py")
    done = project.python("forks.py")
    assert done.code == 0, done.errors
    assert done.document == {"heard": 1, "ends": [-15]}
