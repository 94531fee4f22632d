"""The time that launches are predicted to take on a GPU, from the work that their ops describe.

An op gives a :class:`Work` for each of its launches; :func:`predict` turns one into seconds by the
rates of a :class:`GPU`. Nothing here is measured: a prediction is for finding what bounds a step,
and for comparing with what a GPU measures.

The model: memory delivers the launch's bytes at its copy rate, or less if too few are in flight;
meanwhile every SM works through its programs, whole ones, as many at once as fit. Those on an SM
share its matrix units, issue slots, shared memory and path to L2, of which the slowest counts, and
none finishes before its own chain of waits. The time is that of the slower, of memory and SMs, a
share of the other's that it does not hide, and the gap between two kernels of a graph.
"""

from __future__ import annotations

from typing import NamedTuple

from cvkernels.ops.common.tiles import cdiv, sm_count
from cvkernels.ops.common.traffic import Traffic


class GPU(NamedTuple):
    """What the model knows of a GPU. Rates are of the whole chip, for 16-bit numbers."""

    name: str
    capability: tuple[int, int]
    sms: int
    clock: float  # Hz, under load
    memory: float  # bytes/s of a copy, its reads and its writes together
    l2: float  # bytes/s from L2 into the SMs
    l2_port: float  # bytes a clock into one SM, when others leave it more
    matrix: float  # flop/s of dense products, at the clock that they leave
    shared: float  # bytes a clock and SM, into and out of shared memory
    issue: float  # warp instructions a clock and SM
    load: float  # seconds from a load to its data, under load
    step: float  # seconds of a step of a K loop that nothing else on the SM hides
    kernel: float  # seconds a kernel in a graph, beside its work
    dependent: float  # the same of a kernel that starts before the one ahead of it has ended
    exposed: float  # share of the shorter of memory's and SMs' time that the longer does not hide
    registers: int  # of an SM
    shared_size: int  # bytes of an SM's shared memory that programs can have


# None of these was fitted to a measurement, and none to a target. ``exposed`` was chosen with
# another model's figures of the same kernels in view, which it brings this one close to.
H200 = GPU(
    name="NVIDIA H200",
    capability=(9, 0),
    sms=132,  # data sheet
    clock=1.85e9,  # expected under load; 1.98e9 is the highest
    memory=4.3e12,  # 90 % of the data sheet's 4.8e12
    l2=7.5e12,  # ASSUMED: between 6e12 and 9e12, the first rate to measure
    l2_port=64,  # architecture
    matrix=790e12,  # 80 % of the data sheet's 989e12
    shared=128,  # 32 banks of 4 bytes
    issue=4 * 0.65,  # one a clock and scheduler, of which 65 % are reached
    load=1.0e-6,  # 4.3e12 bytes/s need 32 KB in flight in an SM: Little's law
    step=0.28e-6,  # ASSUMED
    kernel=1.0e-6,  # ASSUMED
    dependent=0.4e-6,  # ASSUMED: programmatic dependent launch saves 0.5 to 1 us
    exposed=0.25,  # ASSUMED, as said: programs load, multiply and store in turn, few on an SM
    registers=65536,  # architecture
    shared_size=228 * 1024,  # architecture
)
# By their data sheets, in the same shares of them; L2 rates ASSUMED.
A100 = H200._replace(
    name="NVIDIA A100", capability=(8, 0), sms=108, clock=1.41e9, memory=1.8e12, l2=4.5e12,
    matrix=250e12, shared_size=164 * 1024, dependent=H200.kernel,
)  # fmt: skip
B200 = H200._replace(
    name="NVIDIA B200", capability=(10, 0), sms=148, memory=7.2e12, l2=10e12, matrix=1.7e15
)


def model_of(capability: tuple[int, int]) -> GPU:
    """The GPU of the nearest generation, with the multiprocessors of that capability's."""
    near = {8: A100, 9: H200}.get(capability[0], B200 if capability[0] > 9 else A100)
    return near._replace(capability=capability, sms=sm_count(capability))


# Of the matrix rate: products of float32 by TF32.
TF32_SHARE = 0.5


def mma_sync_share(gpu: GPU) -> float:
    """Of the matrix rate, what products by mma.sync reach; ASSUMED for Blackwell."""
    return {8: 1.0, 9: 0.5}.get(gpu.capability[0], 0.25)


# Bytes of shared memory that the driver takes of each program.
RESERVED = 1024


class Work(NamedTuple):
    """What one launch does: ``read`` and ``written`` together, all else by one of its programs.

    ``read`` and ``written`` are bytes between memory and L2, each that is needed or made once;
    ``l2`` and ``shared`` are bytes as well. ``instructions`` are those of a program's warps
    together, and ``last`` those that follow its loop, which overlap with other programs alone.
    ``steps`` are the trips of its loop, each of which waits for loads, ``waits`` the loads before
    and after it, and ``in_flight`` the bytes of loads that it does not wait for at once.
    ``matrix_share`` is the share of the matrix rate that its instructions reach at best.
    ``dependent`` says that the launch need not wait for the one ahead of it to end.
    """

    read: float
    written: float
    programs: int = 1
    per_sm: int = 1
    flops: float = 0
    matrix_share: float = 1.0
    l2: float = 0
    shared: float = 0
    instructions: float = 0
    last: float = 0
    steps: int = 0
    waits: float = 1
    in_flight: float = 0
    dependent: bool = False


class Prediction(NamedTuple):
    """Seconds of one or more launches; what ``bound`` names takes longest."""

    seconds: float = 0.0
    bound: str = ""

    @property
    def us(self) -> float:
        return 1e6 * self.seconds


def predict(work: tuple[Work, ...], gpu: GPU) -> Prediction:
    """What the launches take, one after the other."""
    each = [_launch(w, gpu) for w in work]
    bound = max(each, key=lambda p: p.seconds).bound if each else ""
    return Prediction(sum(p.seconds for p in each), bound)


def _launch(work: Work, gpu: GPU) -> Prediction:
    memory, on_sms = memory_time(work, gpu), sm_times(work, gpu)
    gap = gpu.dependent if work.dependent else gpu.kernel
    times = {**on_sms, "memory": memory, "launch": gap}
    longest = max(on_sms.values())
    seconds = max(memory, longest) + gpu.exposed * min(memory, longest) + gap
    return Prediction(seconds, max(times, key=times.__getitem__))


def bytes_in_flight(work: Work, gpu: GPU) -> float:
    """Of the loads of an SM, when every SM has its programs."""
    return work.in_flight * min(work.per_sm, max(1.0, work.programs / gpu.sms))


def bytes_needed(gpu: GPU) -> float:
    """In flight in an SM, for the whole rate of memory: Little's law."""
    return gpu.memory * gpu.load / gpu.sms


def memory_time(work: Work, gpu: GPU) -> float:
    """Of the launch's bytes; of those read, by what its SMs have in flight at least."""
    rate = min(gpu.sms, work.programs) * bytes_in_flight(work, gpu) / gpu.load
    waiting = work.read / rate if rate else 0.0
    return max((work.read + work.written) / gpu.memory, waiting)


def sm_times(work: Work, gpu: GPU) -> dict[str, float]:
    """By what may bound them, the seconds of the SMs' work; ``latency`` of chains of waits."""
    issue, clock = gpu.issue * gpu.clock, gpu.clock
    last = work.last / issue
    times: dict[str, float] = dict.fromkeys(("matrix", "L2", "shared memory", "issue"), 0.0)
    spent = 0.0
    full, rest = divmod(work.programs, gpu.sms * work.per_sm)
    for count, programs in ((full, gpu.sms * work.per_sm), (int(rest > 0), rest)):
        together = cdiv(programs, gpu.sms)  # on the SM that has most
        wave = {
            "matrix": together * work.flops * gpu.sms / (gpu.matrix * work.matrix_share),
            "L2": work.l2 * max(programs / gpu.l2, together / (gpu.l2_port * clock)),
            "shared memory": together * work.shared / (gpu.shared * clock),
            "issue": together * work.instructions / issue,
        }
        times = {name: time + count * wave[name] for name, time in times.items()}
        alone = {**wave, "issue": wave["issue"] - together * last}
        loop = max(alone.values()) / max(1, together)
        chain = max((work.steps + work.waits) * gpu.step, loop) + last
        spent += count * max(*wave.values(), chain)
    slowest = max(times, key=times.__getitem__)
    # a last wave that is not full waits a little in any case
    times[slowest if spent < 1.2 * times[slowest] else "latency"] = spent
    return times


def occupancy(gpu: GPU, threads: int, registers: int, shared: int = 0) -> int:
    """How many programs an SM holds, by the registers of a thread and the shared memory."""
    rounded = cdiv(registers, 8) * 8
    by_registers = gpu.registers // (rounded * threads)
    by_shared = gpu.shared_size // (shared + RESERVED)
    return max(1, min(by_registers, by_shared, 2048 // threads, 32))


# ASSUMED: the share of the matrix rate that cuBLAS reaches, and that it splits long sums.
CUBLAS_SHARE, CUBLAS_SPLITS = 0.7, 4


def product(rows: int, columns: int, depth: int, itemsize: int, gpu: GPU) -> Work:
    """A matrix product by cuBLAS, with ASSUMED tiles: 128 x 128, or 64 x 64 where few."""
    side = 128 if cdiv(rows, 128) * cdiv(columns, 128) >= gpu.sms else 64
    programs = cdiv(rows, side) * cdiv(columns, side)
    splits = CUBLAS_SPLITS if programs < gpu.sms // 2 else 1
    return Work(
        itemsize * (rows + columns) * depth,
        itemsize * rows * columns,
        programs=programs * splits,
        flops=2 * side * side * depth / splits,
        matrix_share=CUBLAS_SHARE * (1.0 if itemsize == 2 else TF32_SHARE),
        l2=itemsize * 2 * side * depth / splits,
        steps=cdiv(depth, 64 * splits),
        waits=2,
        in_flight=3 * itemsize * 2 * side * 64,
    )


def streaming(traffic: Traffic) -> tuple[Work, ...]:
    """Kernels that only move ``traffic``, each its share: 16 bytes a thread, 8 KB a program."""
    if not traffic.kernels:
        return ()
    read, written = (n / traffic.kernels for n in traffic[1:])
    programs = max(1, cdiv(int(max(read, written)), 8192))
    one = Work(read, written, programs, per_sm=4, l2=read / programs, in_flight=8192)
    return (one,) * traffic.kernels
