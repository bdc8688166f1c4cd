"""What `raytrt up` leaves behind: nothing."""

import subprocess
import sys

import psutil

ORPHANING_PARENT = """
import subprocess, sys
from serve.process_tree import adopt_orphans, end_descendants
adopt_orphans()
# A child starts a stubborn grandchild in a session of its own, names it, and dies.
grandchild = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('up', flush=True); time.sleep(600)"
)
child = (
    "import subprocess, sys;"
    f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True, stdout=subprocess.PIPE);"
    "p.stdout.readline(); print(p.pid, flush=True)"
)
pid = int(subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, check=True).stdout)
end_descendants(grace_s=0.2)
print(pid)
"""


def test_an_orphan_in_another_session_that_ignores_sigterm_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANING_PARENT], stdout=subprocess.PIPE, check=True, timeout=60)
    assert not psutil.pid_exists(int(done.stdout))
