"""Makes the batches of coming steps ahead of the step that trains.

One thread walks the steps in order: it looks up what this rank's packs hold and has them collated,
by itself or, with workers, by processes, pack by pack. A few steps are in flight; where a device
takes pinned memory they are pinned before anybody asks. The training thread only takes them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from pegboard.contracts import Batch, Collator, Example
from pegboard.epoch_plan import DataSource, Pieces
from pegboard.errors import DataError
from pegboard.exit_codes import how_it_ended

__all__ = ["BatchMaker", "StepLoader"]

# Larger tensors go through shared memory, which costs a few file descriptors each.
_SENT_AS_BYTES = 2**20

_ENDED_BY_EXECUTOR = signal.SIGVTALRM
"""What an executor ends workers with: SIGTERM is not theirs, and nobody else sends this one."""

_OBITUARY_S = 2.0
"""How long to wait for a dead worker's exit code, which other threads may be taking."""


@dataclass(frozen=True)
class BatchMaker:
    """Pieces of one pack -> batch. Pickles, for worker processes."""

    sources: tuple[DataSource, ...]
    collator: Collator

    def __call__(self, pieces: Pieces) -> Batch:
        """The batch of a pack; a filler from no pieces."""
        return self.collator(self._examples(pieces))

    def _examples(self, pieces: Pieces) -> list[Example]:
        examples = []
        places = zip(pieces.sources.tolist(), pieces.samples.tolist(), strict=True)
        for at, (position, index) in enumerate(places):
            source = self.sources[position]
            example = source.store[index]  # a fresh one at each access
            example.source_id, example.may_skip = source.source_id, source.may_skip
            if pieces.draws is not None:
                example.draw = int(pieces.draws[at])
            if pieces.starts is not None and pieces.stops is not None:
                _cut(example, int(pieces.starts[at]), int(pieces.stops[at]))
            examples.append(example)
        return examples


def _cut(example: Example, start: int, stop: int) -> None:
    """Leave tokens `start` to `stop` of the example."""
    if stop < len(example.input_ids) and example.loss_mask[stop]:
        example.next_id = int(example.input_ids[stop])
    example.input_ids = example.input_ids[start:stop]
    example.loss_mask = example.loss_mask[start:stop]


class StepLoader:
    """Steps of batches, in order, made in the background.

    Args:
        make: pieces of one pack -> batch.
        num_workers: processes that make batches; 0 makes them in the thread.
        pin_memory: give batches in page-locked memory.
        steps_ahead: steps in the making or ready beside the one that trains.
    """

    def __init__(
        self,
        make: BatchMaker,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        steps_ahead: int = 2,
    ) -> None:
        self._make = make
        self._steps_ahead = steps_ahead
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._pool: ProcessPoolExecutor | None = None
        self._context = _KeepingContext()
        self._pool_ready: Future[None] | None = None
        self._walker: ThreadPoolExecutor | None = None
        self._finisher: ThreadPoolExecutor | None = None
        self._steps: Iterator[Sequence[Pieces]] = iter(())
        self._ahead: deque[Future[list[Future[Batch]]]] = deque()

    def start_workers(self, *, wait: bool = False) -> None:
        """Start the processes; until they are up, the thread makes the batches.

        Args:
            wait: return only when they work.
        """
        if self._num_workers and self._pool is None:
            self._finisher = ThreadPoolExecutor(1, thread_name_prefix="pegboard-batches")
            self._context = _KeepingContext()
            self._pool = ProcessPoolExecutor(
                self._num_workers,
                mp_context=self._context,
                initializer=_start_worker,
                initargs=(self._make,),
            )
            self._pool_ready = self._pool.submit(_do_nothing)
        if wait and self._pool_ready is not None:
            try:
                self._pool_ready.result()
            except BrokenProcessPool as error:
                raise self._worker_died() from error

    def start(self, steps: Iterator[Sequence[Pieces]]) -> None:
        """Make the steps that `steps` yields, from now on; what was being made is thrown away.

        Args:
            steps: per step, the pieces of each of its packs. It is advanced in the thread.
        """
        self.stop()
        self.start_workers()
        if self._walker is None:
            self._walker = ThreadPoolExecutor(1, thread_name_prefix="pegboard-data")
        self._steps = steps
        for _ in range(self._steps_ahead):
            self._ahead.append(self._walker.submit(self._next, steps))

    def next_step(self) -> list[Batch]:
        """The next step's batches, waiting for them if need be.

        Raises:
            DataError: a sample can't be had, or a worker died.
        """
        assert self._walker is not None, "start first"
        if any(worker.exitcode is not None for worker in self._context.processes):
            raise self._worker_died()  # although a few steps may be ready
        step = self._ahead.popleft()
        self._ahead.append(self._walker.submit(self._next, self._steps))
        try:
            return [batch.result() for batch in step.result()]
        except BrokenProcessPool as error:
            raise self._worker_died() from error

    def stop(self) -> None:
        """Make no more steps; workers stay."""
        for step in self._ahead:
            step.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Stop, and end threads and workers; a later `start` starts them again."""
        self.stop()
        for executor in (self._walker, self._pool, self._finisher):
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)
        self._walker = self._pool = self._pool_ready = self._finisher = None

    def _next(self, steps: Iterator[Sequence[Pieces]]) -> list[Future[Batch]]:
        """Batches of the next step, some of them to come; none behind the last."""
        return [self._batch(pieces) for pieces in next(steps, ())]

    def _batch(self, pieces: Pieces) -> Future[Batch]:
        if self._pool and self._finisher and self._pool_ready and self._pool_ready.done():
            return self._finisher.submit(self._finish, self._pool.submit(_make_in_worker, pieces))
        batch: Future[Batch] = Future()
        batch.set_result(self._pinned(self._make(pieces)))
        return batch

    def _finish(self, sent: Future[Any]) -> Batch:
        batch = _to_tensors(sent.result())
        assert isinstance(batch, Batch)
        return self._pinned(batch)

    def _worker_died(self) -> DataError:
        return DataError(
            f"a data worker process died ({_who_died(self._context.processes)}); "
            "where memory is short, set fewer dataloader.num_workers"
        )

    def _pinned(self, batch: Batch) -> Batch:
        return batch.pin_memory() if self._pin_memory else batch


class _Worker(SpawnProcess):
    """Hears no SIGTERM, which torchrun and Slurm send to a rank's whole group: the rank still needs
    its batches, to finish the step and save."""

    def start(self) -> None:
        """With SIGTERM held back in this thread, which the process inherits from its first moment."""
        resource_tracker.ensure_running()  # starting it inside would let SIGTERM through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """What an executor calls when another worker is gone; it waits for the end."""
        if self.exitcode is None and self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, _ENDED_BY_EXECUTOR)


class _KeepingContext(SpawnContext):
    """Spawns, and keeps the processes: an executor tells nobody which of its workers died."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        self.processes.append(_Worker(*args, **kwargs))
        return self.processes[-1]


def _who_died(processes: Sequence[Any]) -> str:
    """`process 71, killed by SIGKILL`; all that ended, the executor's own victims apart."""
    until = time.monotonic() + _OBITUARY_S
    while True:
        ended = [(one.pid, code) for one in processes if (code := one.exitcode) is not None]
        # The executor ends the others as soon as one is gone.
        found = [(pid, code) for pid, code in ended if code != -_ENDED_BY_EXECUTOR]
        late = time.monotonic() > until
        if found or late or len(ended) == len(processes):
            named = [f"process {pid}, {how_it_ended(code)}" for pid, code in found or ended]
            return "; or ".join(named) or "it left no exit code"
        time.sleep(0.01)


def _start_worker(make: BatchMaker) -> None:
    import torch

    torch.set_num_threads(1)
    # Ctrl-C is the parent's; where the parent is killed, nothing else would end this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    vars(multiprocessing.current_process())["pegboard_make"] = make


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do_nothing() -> None:
    """Done once a worker is up."""


def _make_in_worker(pieces: Pieces) -> Any:
    make: BatchMaker = vars(multiprocessing.current_process())["pegboard_make"]
    return _to_arrays(make(pieces))


class _Array:
    """A small tensor on its way between processes."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array


def _to_arrays(value: Any) -> Any:
    """Small CPU tensors become arrays, whose bytes are sent at once."""
    import torch

    if isinstance(value, torch.Tensor):
        small = value.nbytes <= _SENT_AS_BYTES and value.dtype != torch.bfloat16
        return _Array(value.numpy()) if small else value
    return _rebuilt(value, _to_arrays)


def _to_tensors(value: Any) -> Any:
    import torch

    if isinstance(value, _Array):
        return torch.from_numpy(value.array)
    return _rebuilt(value, _to_tensors)


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers with `change` done to what they hold."""
    if isinstance(value, Batch):
        fields = (field.name for field in dataclasses.fields(value))
        return dataclasses.replace(value, **{n: change(getattr(value, n)) for n in fields})
    if isinstance(value, dict):
        return {name: change(one) for name, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(one) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(change(one) for one in value)
    return value
