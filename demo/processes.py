"""Rows of the demo side by side, each training in a process of its own.

A step of a small model is a thousand short operations: a second thread makes it no faster, a second process trains
another adapter meanwhile. What prints is the first process alone: the others send it how far they are.
"""
from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from tqdm import tqdm

from . import workers
from .experiment import Experiment
from .models import LanguageModel
from .tasks import Task
from .training import Settings

POLL = 0.2  # seconds between two looks at what the processes have sent


class SentBar:
    """tqdm's loop as the processes run it: what would be drawn is sent as (label, done, total, unit, note)."""

    def __init__(self, sink: Any, steps: Sequence[int], desc: str, unit: str):
        self._sink, self._steps, self._label, self._unit, self._note = sink, steps, desc, unit, ""

    def __iter__(self) -> Iterator[int]:
        self._send(0)
        for done, step in enumerate(self._steps, 1):
            yield step
            self._send(done)

    def set_postfix(self, **values: str) -> None:
        self._note = ", ".join(f"{name}={value}" for name, value in values.items())

    def _send(self, done: int) -> None:
        self._sink.put((self._label, done, len(self._steps), self._unit, self._note))


Done = Callable[[Future], Sequence[Future]]  # told of a job that is done, it returns jobs to wait for besides


class Here:
    """Jobs run one after the other in this process: on a GPU, under torchrun, or where there is a single training."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._calls: dict[Future, tuple] = {}

    def submit(self, method: str, *args: Any) -> Future:
        future: Future = Future()
        self._calls[future] = method, args
        return future

    def watch(self, futures: Sequence[Future], done: Done) -> None:
        """Run the jobs, telling each as it is done."""
        waiting = list(futures)
        for future in waiting:  # which grows meanwhile
            method, args = self._calls.pop(future)
            future.set_result(getattr(self._experiment, method)(*args))
            waiting += done(future)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class SideBySide:
    """Jobs of Experiment in processes that share the threads; each loads the model once."""

    def __init__(self, processes: int, *experiment: Any):
        """experiment: arguments of Experiment.named."""
        context = multiprocessing.get_context("spawn")
        self._sent = context.Queue()
        threads = max(1, torch.get_num_threads() // processes)
        self._pool = ProcessPoolExecutor(processes, context, _start, (self._sent, threads, experiment))
        self._bars: dict[str, tqdm] = {}

    def submit(self, method: str, *args: Any) -> Future:
        return self._pool.submit(_call, method, *args)

    def watch(self, futures: Sequence[Future], done: Done) -> None:
        """Wait for the jobs, telling each as it is done, and draw what they send meanwhile."""
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=POLL, return_when="FIRST_COMPLETED")
            self._draw()
            for future in finished:
                pending |= set(done(future))

    def _draw(self) -> None:
        while True:
            try:
                label, n, total, unit, note = self._sent.get_nowait()
            except queue.Empty:
                return
            bar = self._bars.get(label)
            if bar is None:
                bar = self._bars[label] = tqdm(total=total, desc=label, unit=unit)
            bar.set_postfix_str(note, refresh=False)
            bar.update(n - bar.n)
            if n == total:
                self._bars.pop(label).close()

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.close()
        self._pool.shutdown(cancel_futures=True)


Jobs = Here | SideBySide


def open_jobs(model: LanguageModel, problems: Task, settings: Settings, name: str, trainings: int) -> Jobs:
    """Where so many trainings run: as many at a time as there are threads; on a GPU or under torchrun one by one.

    Args:
        model: as load_model(name) gives it.
    """
    alone = model.device.type != "cpu" or workers.count() > 1
    count = 1 if alone else min(trainings, torch.get_num_threads())
    if count == 1:
        return Here(Experiment(model, problems, settings))
    print(f"{trainings} trainings, {count} at a time, each in a process that loads the model first", flush=True)
    return SideBySide(count, name, problems.name, settings)


_experiment: Experiment  # of a process of SideBySide


def _start(sent: Any, threads: int, experiment: tuple) -> None:
    global _experiment
    torch.set_num_threads(threads)
    _experiment = Experiment.named(*experiment)
    _experiment.bar = lambda steps, desc, unit: SentBar(sent, steps, desc, unit)
    _experiment.progress = False


def _call(method: str, *args: Any) -> Any:
    return getattr(_experiment, method)(*args)
