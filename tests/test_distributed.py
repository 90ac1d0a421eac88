"""The regularizer and training over two processes: FSDP2, HSDP, DDP."""

import os
import re
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "distributed_worker.py"


def test_two_processes():
    """All checks of the worker in one launch, which takes longer than they do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
    done = subprocess.run(
        [*command, str(WORKER)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"^def (test_\w+)", WORKER.read_text(), re.MULTILINE):
        assert len(re.findall(rf"passed {name}\b", done.stdout)) == 2, name
