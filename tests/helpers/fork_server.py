"""What `fresh_process` starts: a process that has imported torch, and forks for every request, a line of JSON.

It answers with the exit code. Where several processes are wanted, that is the first one which is not 0, and the others
end too.
"""

import importlib
import json
import os
import runpy
import signal
import sys

# What transformers imports of torch, and torch of sympy, is most of a start.
PRELOADED = ("torch._dynamo", "torch.distributed.tensor")
SECONDS = 300


def serve() -> dict:
    """Fork for every request. Only the forks return, with what they are to do."""
    for line in sys.stdin:
        request = json.loads(line)
        forks = set()
        for environment in request["environments"]:
            if not (fork := os.fork()):
                return {**request, "environment": environment}
            forks.add(fork)
        print(_wait(forks), flush=True)
    sys.exit()


def _wait(forks: set[int]) -> int:
    """Wait for all of them, and return the first exit code that is not 0. Then, or after `SECONDS`, end the rest."""
    code = 0
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(fork, signal.SIGKILL) for fork in forks])
    signal.alarm(SECONDS)
    while forks:
        fork, status = os.wait()
        forks.discard(fork)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in forks:
                os.kill(other, signal.SIGKILL)
    signal.alarm(0)
    return code


def become(request: dict) -> None:
    """Be the process that was asked for, up to the beginning of its code."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for stream, place in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        descriptor = os.open(place, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])


def run(arguments: list[str]) -> None:
    """Run `-c CODE`, `-m MODULE` or a script as `__main__`."""
    kind, *rest = arguments
    sys.path[0] = ""
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(kind)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    wanted = serve()
    become(wanted)
    run(wanted["arguments"])
