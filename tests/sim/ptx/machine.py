"""Executes a decoded kernel on all threads of all blocks at once, one numpy operation per instruction.

Every thread has its own program counter. The scheduler takes the threads at the smallest one, runs them until they
branch, wait or meet threads parked further down, and chooses again: diverged threads meet again where their paths do.
Threads that wait at a barrier or a shuffle stand still until everyone named by it is there; when nobody can move, that
is the finding. All blocks advance together, which is one of the orders a GPU may choose; races are found by clock.py
whatever the order.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import decoder
from .clock import Clock
from .errors import DivergentBarrier, DivergentShuffle, SimulationError, Trap
from .memory import Access, GlobalMemory, Region, SharedMemory
from .parser import Kernel
from .traffic import Traffic

RUNNING, AT_BARRIER, AT_SHUFFLE, EXITED = range(4)


class Step(NamedTuple):
    """A decoded instruction. control: it moves program counters itself."""

    run: Callable[[Machine], None]
    guard: str | None
    negated: bool
    control: bool
    where: str


class Machine:
    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int], parameters: dict[str, bytes],
        memory: GlobalMemory, shared: SharedMemory, clock: Clock, traffic: Traffic, symbols: dict[str, int], *,
        reverse: bool = False,
    ) -> None:  # fmt: skip
        self.kernel, self.parameters, self.memory, self.shared, self.clock = kernel, parameters, memory, shared, clock
        self.traffic, self.symbols, self.reverse = traffic, symbols, reverse
        self.threads_per_block = int(np.prod(block))
        thread = np.arange(len(clock.block_of)) % clock.width
        self.padding = thread >= self.threads_per_block  # lanes of a last, partial warp
        self.state = np.where(self.padding, EXITED, RUNNING)
        self.pc = np.zeros(len(thread), np.int64)
        self.votes = np.zeros(len(thread), bool)  # of the threads at a barrier that asks whether something holds
        self.registers: dict[str, np.ndarray] = {}
        self.outgoing: dict[str, np.ndarray] = {}  # parameters of a call in preparation
        self.special = _special_registers(thread, clock.block_of, grid, block)
        self.group = self.active = self.state == RUNNING
        self.full = False
        self._threads_of = None
        self.program = decoder.program(kernel)

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while not (self.state == EXITED).all():
                running = self.state == RUNNING
                if not running.any():
                    self._report_stuck()
                counters = np.where(running, self.pc, len(self.program))
                here = counters.min()
                group = counters == here
                later = counters[~group]
                self._run_group(int(here), group & running, int(later.min()) if len(later) else len(self.program))

    def _run_group(self, at: int, group: np.ndarray, horizon: int) -> None:
        """Run these threads from `at` until they branch, wait, exit or reach `horizon`, where others stand."""
        self.group = group
        full = bool((group | (self.state == EXITED)).all())
        program = self.program
        while at < horizon:
            step = program[at]
            self.at = at
            self.active, self.full = group, full
            if step.guard is not None:
                holds = self.read(step.guard)
                self.active = group & ~holds if step.negated else group & holds
                self.full = False
            if step.control:
                step.run(self)
                return
            if self.full or self.active.any():
                step.run(self)
            at += 1
        if at >= len(program):
            raise SimulationError(f"{self.kernel.name}: ran past the last instruction")
        self.pc[group] = at

    @property
    def where(self) -> str:
        return self.program[self.at].where

    def read(self, name: str) -> np.ndarray:
        try:
            return self.registers[name]
        except KeyError:
            raise SimulationError(f"{self.where}: reads register {name}, which nothing has written") from None

    def write(self, name: str, value: np.ndarray, dtype: type) -> None:
        """value (a scalar or one number per thread, already of the register's width) to the active threads."""
        if self.full:
            value = np.asarray(value)
            self.registers[name] = value if value.ndim else np.full(len(self.pc), value)
            return
        old = self.registers.get(name)
        if old is None:
            old = dtype(True) if dtype is np.bool_ else dtype(decoder.POISON & np.iinfo(dtype).max)
        self.registers[name] = np.where(self.active, value, old)

    def threads(self) -> np.ndarray:
        """[n]: the active threads, ascending; counted once for all instructions that the same threads execute."""
        if self._threads_of is not self.active:
            self._threads_of, self._threads = self.active, np.nonzero(self.active)[0]
        return self._threads

    def of_threads(self, value: np.ndarray) -> np.ndarray:
        """[n]: of a scalar or one number per thread, the active threads' own."""
        threads, value = self.threads(), np.asarray(value)
        if value.ndim == 0:
            return np.full(len(threads), value)
        return value if len(threads) == len(value) else value[threads]

    # control flow

    def branch(self, target: int) -> None:
        self.pc[self.group] = self.at + 1
        self.pc[self.active] = target

    def exit(self) -> None:
        self.pc[self.group] = self.at + 1
        self.state[self.active] = EXITED

    def block_barrier(self, holds: np.ndarray | None = None, deliver: Callable | None = None) -> None:
        """deliver(machine, whether `holds` is true of any thread of the block), to the threads that go on."""
        self.pc[self.group] = self.at + 1
        self.state[self.active] = AT_BARRIER
        if holds is not None:
            self.votes[self.active] = np.broadcast_to(holds, self.votes.shape)[self.active]
        waiting = (self.state == AT_BARRIER) | self.padding
        ready = waiting.reshape(-1, self.clock.width).all(axis=1)  # [blocks]
        released = ready.repeat(self.clock.width) & ~self.padding
        self._require_whole_warps(released)
        self.state[released] = RUNNING
        self.clock.block_barrier(np.nonzero(released)[0])
        if deliver is not None and released.any():
            if (self.pc[released] != self.at + 1).any():
                raise DivergentBarrier(f"{self.where}: threads of one block wait at different barriers")
            self.active, self.full = released, bool((released | (self.state == EXITED)).all())
            deliver(self, (self.votes & released).reshape(-1, self.clock.width).any(axis=1).repeat(self.clock.width))
        self.votes[released] = False

    def _require_whole_warps(self, released: np.ndarray) -> None:
        """bar.sync is for whole warps: all threads of one must have met at the same instruction."""
        first = np.where(released, self.pc, len(self.program)).reshape(-1, 32).min(axis=1).repeat(32)
        torn = released & (self.pc != first)
        if torn.any():
            thread = int(np.argmax(torn))
            places = " and ".join(self.program[pc - 1].where for pc in (first[thread], self.pc[thread]))
            raise DivergentBarrier(f"{places}: the warp of {self.clock.name(thread)} waits at two barriers at once")

    def gather_warp(self, members: np.ndarray) -> bool:
        """Make the active threads wait until all lanes in their member mask [threads] are here.

        True: self.active now holds complete warps, run the instruction. False: nobody's warp is complete yet.
        """
        arrived = self.active | ((self.state == AT_SHUFFLE) & (self.pc == self.at))
        lane = np.uint32(1) << (np.arange(len(arrived)) % 32).astype(np.uint32)
        mask = np.bitwise_or.reduce(np.where(arrived, members, np.uint32(0)).reshape(-1, 32), axis=1).repeat(32)
        wanted = (mask & lane) != 0
        if (gone := wanted & (self.state == EXITED) & ~self.padding).any():
            raise DivergentShuffle(f"{self.where}: waits for {self.clock.name(int(np.argmax(gone)))}, which has exited")
        if (uninvited := self.active & ~wanted).any():
            raise DivergentShuffle(f"{self.where}: {self.clock.name(int(np.argmax(uninvited)))} is not in its own mask")
        complete = ~(wanted & ~arrived & ~self.padding).reshape(-1, 32).any(axis=1).repeat(32)
        self.pc[self.group & ~self.active] = self.at + 1
        self.pc[arrived] = self.at
        self.state[arrived] = np.where(complete, RUNNING, AT_SHUFFLE)[arrived]
        self.active = self.group = arrived & complete
        self.full = bool((self.active | (self.state == EXITED)).all())
        return bool(self.active.any())

    def require_present(self, origin: np.ndarray) -> None:
        """origin [threads]: whom each active thread reads a register of."""
        absent = self.active & ~self.active[origin]
        if absent.any():
            reader = int(np.argmax(absent))
            raise DivergentShuffle(
                f"{self.where}: {self.clock.name(reader)} reads a register of {self.clock.name(int(origin[reader]))}, "
                "which takes no part"
            )

    def proceed(self) -> None:
        """After a control instruction that only waited."""
        self.pc[self.group] = self.at + 1

    def _report_stuck(self) -> None:
        waiting = np.nonzero((self.state == AT_SHUFFLE) | (self.state == AT_BARRIER))[0][0]
        where = self.program[self.pc[waiting] - (self.state[waiting] == AT_BARRIER)].where
        who = self.clock.name(waiting)
        if (self.state == AT_SHUFFLE).any():
            raise DivergentShuffle(f"{where}: {who} waits for lanes of its warp that never come")
        block = self.clock.block_of == self.clock.block_of[waiting]
        missing = np.nonzero(block & (self.state == EXITED) & ~self.padding)[0]
        absent = self.clock.name(missing[0])
        raise DivergentBarrier(f"{where}: {who} waits at the barrier, which {absent} never reaches")

    def trap(self, why: str) -> None:
        self.pc[self.group] = self.at + 1
        if self.active.any():
            raise Trap(f"{self.where}: {self.clock.name(int(np.argmax(self.active)))}: trap: {why}")

    # memory

    def access(self, lanes: np.ndarray, size: int, opcode: str) -> Access:
        return Access(f"{self.where}: {opcode}", lanes, size, self.clock)

    def locate(self, space: str, access: Access, addresses: np.ndarray) -> list[tuple[Region, np.ndarray, np.ndarray]]:
        if space == "shared":
            return self.shared.locate(access, addresses)
        return self.memory.locate(access, addresses)


def _special_registers(thread: np.ndarray, block: np.ndarray, grid, extent) -> dict[str, np.ndarray]:
    """%tid, %ntid, %ctaid, %nctaid, %laneid, %warpid and the lane masks, as uint32."""
    special = {"%laneid": thread % 32, "%warpid": thread // 32}
    for axis, name in enumerate("xyz"):
        special[f"%tid.{name}"] = thread // int(np.prod(extent[:axis])) % extent[axis]
        special[f"%ctaid.{name}"] = block // int(np.prod(grid[:axis])) % grid[axis]
        special[f"%ntid.{name}"] = np.full(len(thread), extent[axis])
        special[f"%nctaid.{name}"] = np.full(len(thread), grid[axis])
    lane = thread % 32
    special["%lanemask_eq"] = 1 << lane
    special["%lanemask_lt"] = (1 << lane) - 1
    special["%lanemask_le"] = (2 << lane) - 1
    return {name: values.astype(np.uint32) for name, values in special.items()}
