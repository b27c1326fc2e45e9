"""What the supervisor of several API processes may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_supervisor_can_choose_multiprocess_metrics(tmp_path: Path) -> None:
    """prometheus_client decides on its mode when it is imported, so importing the supervisor must not import it."""
    program = (
        "import sys, pathlib, distributor_node.services.api.supervisor\n"
        "from distributor_node.shared.observability.multiprocess import prepare_multiprocess\n"
        "prepare_multiprocess(pathlib.Path(sys.argv[1]))\n"
        "print('prometheus_client' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"
