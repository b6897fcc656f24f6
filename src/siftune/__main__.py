"""`python -m siftune`, which launchers such as torchrun and accelerate start on every rank."""

import os
import sys

from siftune.base.environment import launch_size
from siftune.cli.main import main

if __name__ == "__main__":
    code = main()
    if code and launch_size() > 1:
        sys.stderr.flush()
        os._exit(code)  # threads that wait for another rank would abort the process, and hide its exit code
    sys.exit(code)
