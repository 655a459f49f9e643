"""What the scripts that run under torchrun share: `tests/scripts`."""

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """End this rank when all have come here, without the end of the interpreter: in it, threads of gloo that groups
    still referred to (FSDP2 keeps them) own, abort the process now and then."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
