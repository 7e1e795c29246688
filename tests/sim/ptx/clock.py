"""Happens-before: which of two accesses by different threads a barrier, or a fence and an atomic, put in order.

Every thread has an epoch: how many fences its block, how many block barriers and how many warp barriers it has passed.
Two accesses are ordered if

  - same block: a block barrier lies between them, or both threads are of one warp and a warp barrier lies between them;
  - different blocks: the first block fenced and then did an atomic, the second saw that atomic and then fenced.

The fence rule works on whole blocks, not on threads: it takes for granted that a barrier gathered the block's writes
before the thread that fences.
"""
from __future__ import annotations

import numpy as np

NOBODY = -1
_WARP, _PHASE = 24, 24  # bits of an epoch: fences | block barriers | warp barriers
_FENCE = _WARP + _PHASE


class Clock:
    def __init__(self, blocks: int, threads_per_block: int) -> None:
        warps_per_block = -(-threads_per_block // 32)
        self.width = warps_per_block * 32  # threads of a block, rounded up to whole warps
        self.block_of = np.arange(blocks).repeat(self.width)
        self.warp_of = np.arange(blocks * warps_per_block).repeat(32)
        self.epoch = np.zeros(len(self.block_of), np.int64)
        self._known = np.full((blocks, blocks), -1, np.int64)  # [b, a]: fences of a whose past block b can see
        self._acquired = np.full((blocks, blocks), -1, np.int64)  # the same once b fences
        self._released: list[np.ndarray | None] = [None] * blocks
        self._carried: dict[int, np.ndarray] = {}  # address of an atomic -> what seeing it tells

        # A set of threads is one number: a thread, "several of warp w", "several of block b" or "several blocks".
        threads, warps = len(self.block_of), len(self.warp_of) // 32
        self._several_of_warp, self._several_of_block = threads, threads + warps
        self._several_blocks = threads + warps + blocks
        nowhere = np.full(1, NOBODY)  # also what index -1 (NOBODY) finds
        self._block = np.concatenate([self.block_of, np.arange(warps) // warps_per_block, np.arange(blocks), nowhere])
        self._warp = np.concatenate([self.warp_of, np.arange(warps), np.full(blocks, NOBODY), nowhere])

    def block_barrier(self, threads: np.ndarray) -> None:
        self.epoch[threads] = ((self.epoch[threads] >> _WARP) + 1) << _WARP

    def warp_barrier(self, threads: np.ndarray) -> None:
        self.epoch[threads] += 1

    def fence(self, threads: np.ndarray) -> None:
        for block in np.unique(self.block_of[threads]):
            mine = slice(block * self.width, (block + 1) * self.width)
            self._known[block] = np.maximum(self._known[block], self._acquired[block])
            self._known[block, block] = self.epoch[mine].max() >> _FENCE
            self._released[block] = self._known[block].copy()
            self.epoch[mine] += 1 << _FENCE

    def atomic(self, thread: int, address: int) -> None:
        block = self.block_of[thread]
        carried = self._carried.get(address)
        if carried is not None:
            self._acquired[block] = np.maximum(self._acquired[block], carried)
        released = self._released[block]
        if released is not None:
            self._carried[address] = released if carried is None else np.maximum(carried, released)

    def ordered(self, who: np.ndarray, when: np.ndarray, thread: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Did the accesses by `who` (a thread, a set or NOBODY) at `when` happen before `thread` at `now`?"""
        phase, now_phase = (epoch >> _WARP & (1 << _PHASE) - 1 for epoch in (when, now))
        block, their_block = self._block[thread], self._block[who]
        warp_barrier = (self._warp[who] == self._warp[thread]) & (when % (1 << _WARP) < now % (1 << _WARP))
        in_block = (phase < now_phase) | (phase == now_phase) & warp_barrier
        across = (their_block != NOBODY) & (self._known[block, their_block] >= when >> _FENCE)
        return (who == NOBODY) | (who == thread) | np.where(their_block == block, in_block, across)

    def join(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The smallest set that holds both sets."""
        block, warp = self._block[b], self._warp[b]
        same_block = (self._block[a] == block) & (block >= 0)
        joined = np.where(same_block, self._several_of_block + block, self._several_blocks)
        joined = np.where((self._warp[a] == warp) & (warp >= 0), self._several_of_warp + warp, joined)
        return np.where((a == NOBODY) | (a == b), b, joined)

    def name(self, who: int) -> str:
        """'block 1 thread 37', or the set in words."""
        if who < self._several_of_warp:
            return f"block {who // self.width} thread {who % self.width}"
        if who < self._several_of_block:
            return f"several threads of block {self._block[who]} warp {self._warp[who] % (self.width // 32)}"
        return f"several threads of block {self._block[who]}" if who < self._several_blocks else "several blocks"
