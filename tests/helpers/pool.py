"""Two persistent processes, joined by gloo, that run functions given by import path.

They start once a session (importing Lightning takes longer than most jobs) and only if a test asks for them. Inside,
the environment is that of torchrun, so that ``Trainer(devices=2, strategy="ddp")`` starts no process of its own.
"""

import importlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

WORLD_SIZE = 2


class PoolError(RuntimeError):
    """A job raised on a rank, or did not end in time."""


class Pool:
    """Start with the first job; :meth:`close` at the end."""

    def __init__(self):
        self._processes, self._pipes = [], []

    def run(self, function, timeout=120.0, **kwargs):
        """Call ``function`` ("package.module.name") on both ranks.

        Returns:
            What it returned on each rank; only what ``torch.load(weights_only=True)`` reads.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, kwargs, os.getcwd()))
        answers, deadline = [], time.monotonic() + timeout
        for rank, pipe in enumerate(self._pipes):
            # A rank that failed leaves the other in a collective: what is known by then is reported, both are ended.
            if not pipe.poll(max(0.1, deadline - time.monotonic())):
                others = [p.recv()[1] for p in self._pipes if p is not pipe and p.poll(0)]
                self.close()
                raise PoolError(f"{function} did not end on rank {rank} within {timeout} s. The others: {others}")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failed:
            self.close()  # the process group may be out of step
            raise PoolError("\n".join(failed))
        import torch

        return [torch.load(io.BytesIO(data), weights_only=True) for _, data in answers]

    def close(self):
        for pipe in self._pipes:
            pipe.close()  # ends the worker's loop
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp()) / "store")  # a file: no port to race for
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)


POOL = Pool()  # one for the session, whichever folders' tests ask for it; after close() a job starts it anew


def _serve(rank, store, pipe):
    # Before Lightning is imported: it reads the rank at import.
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "tests",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # never used: the group is there before Lightning asks for it
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    while True:
        try:
            function, kwargs, folder = pipe.recv()
        except EOFError:
            return
        try:
            os.chdir(folder)
            module, _, name = function.rpartition(".")
            data = io.BytesIO()
            torch.save(getattr(importlib.import_module(module), name)(**kwargs), data)
            pipe.send((True, data.getvalue()))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
