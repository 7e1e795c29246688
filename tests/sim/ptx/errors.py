"""What the interpreter can find. Each error names the PTX line, the source line if known, and the thread."""


class SimulationError(Exception):
    """Anything wrong with a kernel, or with the interpreter's knowledge of PTX."""


class UnsupportedInstruction(SimulationError):
    """An opcode, modifier or operand the interpreter does not know."""


class LocalMemory(SimulationError):
    """The kernel keeps data in local memory: a spill or an array the compiler could not keep in registers."""


class OutOfBounds(SimulationError):
    """An access outside every buffer, outside the elements of a buffer's rows, or outside shared memory."""


class Misaligned(SimulationError):
    """An access whose address is not a multiple of its size."""


class ReadOnly(SimulationError):
    """A write to a buffer the launch declared read-only, or to data also read through the non-coherent cache."""


class Uninitialised(SimulationError):
    """A read of shared memory, of an output or of a register that nothing has written."""


class Race(SimulationError):
    """Two unordered accesses to one location by different threads, one of them a write."""


class DivergentBarrier(SimulationError):
    """Threads that wait at a barrier some thread of their warp or block never reaches."""


class DivergentShuffle(SimulationError):
    """Lanes that wait for lanes of their warp that never come, or read a register of one that takes no part."""


class Trap(SimulationError):
    """The kernel stopped itself: trap, or a failed assertion."""
