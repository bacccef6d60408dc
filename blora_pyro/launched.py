"""What this process knows of how it was started, by `accelerate launch` or `torchrun`."""

import os


def started() -> int:
    """How many processes were started together with this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is to write and report; before `Processes.join`, too."""
    return started() == 1 or os.environ.get("RANK", "0") == "0"
