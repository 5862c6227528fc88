"""Commands without the seconds that importing torch and DeepSpeed takes: forks of a process that has imported them.

`python warm.py FD` is that process. Each message on the socket FD is a command as JSON, with the files that become its
standard output, its errors, and where its process id and exit status are written.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

MESSAGE = 2**18
"""Bytes of the largest message"""


class Warm:
    """As much of `subprocess.Popen` as tests use, for [interpreter, "-m", module or script, arguments...]."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.command, self.returncode = command, None
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        reading, writing = os.pipe()
        message = json.dumps({"words": command[1:], "env": env, "folder": os.getcwd()}).encode()
        server = _server(env.get("OMP_NUM_THREADS"), env.get("GLIBC_TUNABLES"))
        socket.send_fds(server, [message], [self._out.fileno(), self._err.fileno(), writing])
        os.close(writing)
        self._status = os.fdopen(reading)
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote. Raises subprocess.TimeoutExpired after so many seconds."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            self.kill()
            raise subprocess.TimeoutExpired(self.command, timeout or 0.0, stderr=self._read(self._err))
        self.poll()
        return self._read(self._out), self._read(self._err)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @staticmethod
    def _read(file: tempfile._TemporaryFileWrapper[str]) -> str:
        file.seek(0)
        return file.read()


@cache
def _server(threads: str | None, malloc: str | None) -> socket.socket:
    """The socket of a server with what must be known at its start: the number of threads, malloc's settings."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    given = {"OMP_NUM_THREADS": threads, "GLIBC_TUNABLES": malloc}
    server = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        env={**os.environ, **{name: value for name, value in given.items() if value is not None}},
    )  # fmt: skip
    theirs.close()
    atexit.register(server.wait)
    atexit.register(ours.close)
    return ours


def serve(control: socket.socket) -> tuple[list[str], dict[str, str]] | None:
    """Start commands until the socket is closed. Returns the words and environment in the process of a command."""
    running: dict[int, tuple[int, int]] = {}  # by what is readable when it ends: process, where its status goes
    while True:
        for ready in select.select([control, *running], [], [])[0]:
            if ready is not control:
                pid, status = running.pop(ready)
                os.close(ready)
                os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
                os.close(status)
                continue
            message, files, *_ = socket.recv_fds(control, MESSAGE, 3)
            if not message:
                return None
            if pid := os.fork():
                os.write(files[2], f"{pid}\n".encode())
                running[os.pidfd_open(pid)] = pid, files[2]
                os.close(files[0])
                os.close(files[1])
                continue
            control.close()
            for file in [*running, *(status for _, status in running.values()), files[2]]:
                os.close(file)
            os.dup2(files[0], 1)
            os.dup2(files[1], 2)
            command = json.loads(message)
            os.chdir(command["folder"])
            return command["words"], command["env"]


def main() -> None:
    """Import what commands do, then serve; in the process of a command, be it."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imports torch's compiler, as every run does
    import numpy as np
    import torch.utils.tensorboard  # noqa: F401
    import typer  # noqa: F401
    from harmony_fast.engine import train  # noqa: F401
    from harmony_fast.engine.data import crops

    # The first function that numba runs costs 0.8 s; not one with threads, which would not outlive a fork.
    crops.cut(np.zeros((4, 4, 3), np.uint8), (0, 0, 4, 4), np.zeros((2, 2, 3), np.uint8))
    gc.collect()
    gc.freeze()  # commands need not look through what is here already
    found = serve(socket.socket(fileno=int(sys.argv[1])))
    if found is None:
        end(0)
    words, environment = found
    os.environ.clear()
    os.environ.update(environment)
    end(be(words))


def be(words: list[str]) -> int:
    """Run a command; its exit status."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return exit.code or 0
        print(exit.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def end(status: int) -> NoReturn:
    """As the interpreter does, but for the second that it takes to clear away what the server had imported."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
