"""Fresh Python processes that start in a moment: forks of one that has imported torch, which takes most of a start.

`run` takes what would stand behind `python`, which has its own environment, and imports transformers, the Hub's client
and this package itself. Other flags of Python and other paths of packages have servers of their own.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")


@functools.cache
def _server(flags: tuple[str, ...], packages: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": packages}
    return subprocess.Popen([sys.executable, *flags, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=environment)  # fmt: skip


def run(
    *arguments: object,
    ranks: int = 1,
    flags: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess:
    """Run `-c CODE`, `-m MODULE` or a script, with arguments, in one process, or in as many as torchrun would start.

    Args:
        flags: of Python itself.
        environment: the whole environment; otherwise that of this process. `PYTHONPATH` says where packages lie.
    """
    environment = dict(os.environ if environment is None else environment)
    environments = [environment | group for group in (ranks_of_a_group(ranks) if ranks > 1 else [{}])]
    server = _server(flags, environment.get("PYTHONPATH", ""))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {"arguments": [str(argument) for argument in arguments], "environments": environments,
                   "cwd": str(cwd or Path.cwd()), "out": str(out), "err": str(err)}  # fmt: skip
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([*flags, *request["arguments"]], code, out.read_text(), err.read_text())


def ranks_of_a_group(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each rank, with a port of the loopback interface that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    of_ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in variables.items()} for variables in of_ranks]


def check(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """As `run`, where an exit code other than 0 is a failed assertion that shows the end of what was said."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
