"""Runs a function in a fresh gloo process group of N processes, for tests.

The processes come from a fork server that has torch loaded, which makes a group of two cost 0.4 s where freshly
spawned interpreters cost 9. A test calls ``run(function, world_size=2, …)`` and gets every rank's result.
"""

import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOAD = [
    "omegaconf",
    "pytest",
    "torch._dynamo",  # fully_shard would import it in every process: 1.6 s
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
]
GRACE = 3.0  # seconds that the others get to fail by themselves, and so to show where, once one has failed


class Failed(AssertionError):
    """At least one process raised, died or did not end in time; the message shows each rank's end.

    ``exitcodes`` has one number a rank: 0 finished, 1 raised, -9 killed by signal 9.
    """

    def __init__(self, message: str, *, exitcodes: list[int]):
        super().__init__(message)
        self.exitcodes = exitcodes


@dataclass(frozen=True)
class _Call:
    """What one process is asked to do; picklable even where the test's module cannot be imported by name."""

    module: str
    file: str
    function: str
    arguments: bytes
    rendezvous: str | None
    rank: int
    world_size: int


def run(
    function: Callable[..., Any], *, world_size: int, timeout: float = 120.0, group: bool = True, **kwargs: Any
) -> list[Any]:
    """Call ``function(**kwargs)`` in each of ``world_size`` processes that share a new gloo group.

    Args:
        function: at the top level of its module; asks ``torch.distributed`` for its rank.
        world_size: number of processes; 1 makes a group of one.
        timeout: seconds until all are killed.
        group: whether there is a process group; without one a function may fork.
        kwargs: handed to the function; must pickle, as must its result.

    Returns:
        The result of every rank, in order.

    Raises:
        Failed: some process raised, died or was late.
    """
    __tracebackhide__ = True
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            call = _Call(
                module=function.__module__,
                file=inspect.getfile(function),
                function=function.__qualname__,
                arguments=pickle.dumps(kwargs),
                rendezvous=f"file://{folder}/rendezvous" if group else None,
                rank=rank,
                world_size=world_size,
            )
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(call, sender), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        answers = _collect(processes, pipes=pipes, deadline=time.monotonic() + timeout)
    exitcodes = [process.exitcode if process.exitcode is not None else -9 for process in processes]
    if any(exitcodes) or None in answers:
        raise Failed(_story(answers, exitcodes=exitcodes, timeout=timeout), exitcodes=exitcodes)
    return [pickle.loads(answer) for _, answer in answers]


def _collect(processes: Sequence[BaseProcess], *, pipes: list[Connection], deadline: float) -> list[Any]:
    """Wait for every process or the deadline, and leave none alive.

    Returns:
        One entry a rank: (whether it succeeded, pickled result or traceback), or None without an answer.
    """
    answers: list[Any] = [None] * len(processes)
    waiting = set(range(len(processes)))
    while waiting and time.monotonic() < deadline:
        multiprocessing.connection.wait([pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        for rank in [rank for rank in waiting if pipes[rank].poll()]:
            waiting.discard(rank)
            try:
                answers[rank] = pipes[rank].recv()
            except EOFError:
                pass
            if answers[rank] is None or not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE)
    for rank, process in enumerate(processes):
        if rank in waiting:
            process.kill()
        process.join()
        pipes[rank].close()
    return answers


def _story(answers: list[Any], *, exitcodes: list[int], timeout: float) -> str:
    """How each rank ended, the one that failed by itself first."""
    parts = []
    for rank, (answer, exitcode) in enumerate(zip(answers, exitcodes, strict=True)):
        if answer is None:
            parts.append(f"rank {rank} ended by signal {-exitcode} without an answer (limit {timeout:g} s)")
        elif answer[0]:
            parts.append(f"rank {rank} returned")
        else:
            parts.append(f"rank {rank} raised:\n{answer[1]}")
    return "\n".join(sorted(parts, key=lambda part: "raised" not in part))


def _work(call: _Call, pipe: Connection) -> None:
    """In the child: join the group, call, answer."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    try:
        function = getattr(_module(call), call.function)
        arguments = pickle.loads(call.arguments)
        if call.rendezvous is not None:
            torch.distributed.init_process_group(
                "gloo", init_method=call.rendezvous, rank=call.rank, world_size=call.world_size
            )
        result = pickle.dumps(function(**arguments))
        if call.rendezvous is not None:
            torch.distributed.destroy_process_group()
    except BaseException:  # the traceback goes to the test, whatever it was
        pipe.send((False, traceback.format_exc()))
        sys.exit(1)
    pipe.send((True, result))


def _module(call: _Call) -> ModuleType:
    """The test's module under the name it has there: pytest's importlib mode leaves test modules out of sys.path."""
    if call.module in sys.modules:
        return sys.modules[call.module]
    spec = importlib.util.spec_from_file_location(call.module, Path(call.file))
    assert spec is not None and spec.loader is not None, f"{call.file=}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[call.module] = module
    spec.loader.exec_module(module)
    return module
