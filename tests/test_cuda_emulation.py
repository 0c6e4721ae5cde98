"""The emulator of CUDA kernels: each bug it is to find, seeded on purpose; its operations against PyTorch.

The kernels are in ``tests/cuda_bugs``: ``bugs.cu`` has a wrong one and its correct twin for each kind of bug.
"""

from __future__ import annotations

import re
from pathlib import Path

import emulation
import pytest
import torch
from emulation import EmulationError, emulated
from torch import Tensor

from visionllm.ops import native

N = 64

THREAD = r"thread \(\d+, 0, 0\)"
TILE = r"shared array 'tile' byte \d+ of \d+"
ELEMENT = r"element \d+ \[\d+\]"
RACE = rf"(reads|writes) {TILE}, which {THREAD} has (written|read) without "


def at(what: str) -> str:
    """How a message names a barrier or shuffle in bugs.cu."""
    return rf"{what} \(.*bugs.cu:\d+\)"


# What the message of the plain driver says, after the position that every message begins with.
FOUND_BY_RECORDS = {
    "shared_overrun": "writes 4 bytes from byte 256 of shared array 'tile', which has 256: out of bounds",
    "dynamic_overrun": "reads 4 bytes from byte 256 of shared array 'bytes', which has 256: out of bounds",
    "uninitialised_shared": "reads shared array 'tile' byte 252 of 256, which nothing has written",
    "missing_barrier": rf"{RACE}__syncthreads between|reads {TILE}, which nothing has written",
    "missing_barrier_in_loop": rf"{RACE}__syncthreads between",
    "missing_warp_barrier": rf"{RACE}__syncwarp or __syncthreads between",
    "barrier_of_half_warp": rf"{RACE}__syncwarp or __syncthreads between",
    "shared_atomics": rf"(reads|atomically updates) shared array 'sums' byte \d+ of 16, which {THREAD}"
    "( and others)? has (updated|read) without __sync",
    "return_before_barrier": rf"divergent barrier: {THREAD} waits at {at('__syncthreads')}, "
    rf"which {THREAD} never reaches: it has returned from the kernel",
    "two_barriers": rf"divergent barrier: {THREAD} waits at {at('__syncthreads')}, "
    rf"{THREAD} at {at('__syncthreads')}",
    "barrier_against_warp_barrier": rf"divergent warp: {THREAD} waits at {at('__syncwarp')} "
    rf"with mask 0xffffffff, which {THREAD} never reaches: it waits at {at('__syncthreads')}",
    "shuffle_in_branch": rf"divergent warp: {THREAD} waits at {at('__shfl_xor_sync')} "
    rf"with mask 0xffffffff, which {THREAD} never reaches: it has returned",
    "shuffles_in_two_branches": rf"divergent warp: {THREAD} waits at {at('__shfl_xor_sync')}"
    rf" with mask 0xffffffff, {THREAD} at {at('__shfl_xor_sync')}",
    "shuffle_from_missing_lane": "a shuffle in which lane 0 reads lane 16, which does not take part in it",
    "vote_without_own_lane": rf"{at('__any_sync')} with mask 0xfffffffe, which lacks its own lane 0",
    "returned_lane": rf"divergent warp: {THREAD} waits at __shfl_xor_sync .* it has returned",
    "read_out_of_bounds": r"reads 4 bytes from byte \d+ of 'input', which has 256: out of bounds",
    "write_out_of_bounds": "writes 4 bytes from byte 256 of 'output', which has 256: out of bounds",
    "write_to_input": rf"writes 'input' {ELEMENT}, an input",
    "unwritten_output": "1 of 64 elements of output 'output' are as before the call, .* the first at "
    "'output' element 32",
    "uninitialised_output": rf"reads 'output' {ELEMENT}, which nothing has written",
    "uninitialised_workspace": rf"atomically updates 'workspace' {ELEMENT}, which nothing has written",
    "sum_over_blocks": rf"(reads|writes) 'output' {ELEMENT}, which block \(\d, 0, 0\) has written in the "
    "same launch: blocks may share an element only by atomics",
    "two_threads_one_element": rf"writes 'output' {ELEMENT}, which {THREAD} has written without"
    " __syncwarp or __syncthreads between",
    "last_block": rf"reads 'workspace' {ELEMENT}, which block \(\d, 0, 0\) has written in the same launch",
    "copy_no_wait": rf"reads {TILE}, to which an asynchronous copy of {THREAD} is on its way: "
    "copy_async_wait must come first",
    "copy_wait_for_too_few": rf"asynchronous copy of {THREAD} is on its way: copy_async_wait must come",
    "copy_no_barrier": rf"{TILE}, (which {THREAD}( and others)? has (written|read) without"
    "|to which an asynchronous copy of|which nothing has)",
    "copy_refill": rf"{TILE}, (which .* has (written|read) without|to which an asynchronous copy of)",
    "copy_misaligned": f"{at('copy_async_16')} copies to a shared address that is no multiple of 16",
    "misaligned_matrix": r"lane \d+'s row of ldmatrix is not aligned to 16 bytes",
    "stack_overflow": "(?s)signal 11 .*the stack of a CUDA thread overflowed.*"
    rf"kernel 'stack_overflow_kernel', block \(0, 0, 0\), {THREAD}",
    "too_many_threads": r"_kernel': launched with a block of \(1088, 1, 1\) threads: at most 1024",
    "empty_grid": r"'unwritten_output_kernel': launched with a grid of \(0, 1, 1\) blocks: none may be 0",
    "too_much_shared_memory": "_kernel': launched with 101377 bytes of dynamic shared memory: "
    "the device has 101376 for a block",
    "host_reads_device_memory": "host code reads device memory",
}

# The same of the sanitized driver: the compiler's report, and the emulator's line with the position.
UNDEFINED = r"bugs.cu:\d+:\d+: runtime error: "
FOUND_BY_SANITIZERS = {
    "shared_overrun": rf"{UNDEFINED}index 64 out of bounds for type 'float ?\[64\]'",
    "dynamic_overrun": "AddressSanitizer: use-after-poison",
    "read_out_of_bounds": "AddressSanitizer: heap-buffer-overflow",
    "write_out_of_bounds": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": f"{UNDEFINED}.* misaligned address .* requires 8 byte alignment",
    "integer_overflow": f"{UNDEFINED}signed integer overflow",
    "register_array_overrun": rf"{UNDEFINED}index \d+ out of bounds for type 'float ?\[4\]'",
}

# Found in either driver, by the scheduler or by what the outputs hold.
FOUND_BY_BOTH = (
    "return_before_barrier",
    "two_barriers",
    "barrier_against_warp_barrier",
    "shuffle_in_branch",
    "shuffles_in_two_branches",
    "shuffle_from_missing_lane",
    "vote_without_own_lane",
    "returned_lane",
    "unwritten_output",
    "copy_misaligned",
    "misaligned_matrix",
    "too_many_threads",
    "empty_grid",
    "too_much_shared_memory",
)

NOT_IN_A_THREAD = ("too_many_threads", "empty_grid", "too_much_shared_memory", "host_reads_device_memory")
AFTER_THE_LAUNCH = ("unwritten_output",)


def run(name: str, fixed: bool, n: int = N, **options: object) -> Tensor:
    """Calls one function of bugs.cu and returns its output [n]."""
    values = torch.linspace(1, 2, n)
    output, workspace = torch.empty(n), torch.empty(n)
    with emulated(driver="cuda_bugs", **options):
        native.call(name, output, workspace, values, fixed)
    return output


def expected(name: str) -> Tensor:
    """The outputs of the correct twins that are not simply the input."""
    values = torch.linspace(1, 2, N)
    i = torch.arange(N)
    if name in ("dynamic_overrun", "too_much_shared_memory"):
        return values[(i + 1) % N]
    if name == "missing_barrier":
        return values[(i + 33) % N]
    if name == "missing_barrier_in_loop":
        return values[(i + 33) % N] * 3
    if name == "missing_warp_barrier":
        return values[i ^ 1] * 32
    if name == "barrier_of_half_warp":
        return values[i ^ 15] + 0 + 1 + 2
    if name == "shared_atomics":
        return values * 16
    if name in ("shuffle_in_branch", "shuffles_in_two_branches"):
        return values[i ^ 1]
    if name == "shuffle_from_missing_lane":
        return torch.where(i % 32 < 16, values[i ^ 8], values)
    if name == "returned_lane":
        return values.view(2, 32).sum(1, keepdim=True).expand(2, 32).flatten()
    if name == "sum_over_blocks":
        return values * 5
    if name == "last_block":
        return values[:5].sum().expand(N)
    if name == "misaligned":
        return torch.where(i < N - 2, values, 0.0)
    return values


@pytest.mark.parametrize("name", FOUND_BY_RECORDS)
def test_bug_is_found(name: str) -> None:
    with pytest.raises(EmulationError) as caught:
        run(name, fixed=False)
    message = str(caught.value)
    assert re.search(FOUND_BY_RECORDS[name], message), message
    if name in NOT_IN_A_THREAD or name in AFTER_THE_LAUNCH:
        assert message.startswith(f"{name}: "), message
    elif name != "stack_overflow":
        position = rf"{name}: kernel '\w+_kernel', block \(\d+, 0, 0\), thread \(\d+, 0, 0\): "
        assert re.match(position, message), message


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize(
    "name",
    [
        "missing_barrier",
        "missing_barrier_in_loop",
        "missing_warp_barrier",
        "barrier_of_half_warp",
        "shared_atomics",
        "sum_over_blocks",
        "last_block",
    ],
)
def test_races_are_found_in_any_order(name: str, order: str) -> None:
    with pytest.raises(EmulationError):
        run(name, fixed=False, thread_order=order, block_order=order)


@pytest.mark.parametrize("name", [*FOUND_BY_SANITIZERS, *FOUND_BY_BOTH])
def test_bug_is_found_sanitized(name: str) -> None:
    with pytest.raises(EmulationError) as caught:
        run(name, fixed=False, sanitize=True)
    message = str(caught.value)
    assert re.search((FOUND_BY_RECORDS | FOUND_BY_SANITIZERS)[name], message), message
    if name in FOUND_BY_SANITIZERS:
        position = rf"emulation: in {name}: kernel '\w+_kernel', block \(\d+, 0, 0\), thread \(\d+, 0, 0\)"
        assert re.search(position, message), message


@pytest.mark.parametrize("name", ["missing_barrier", "uninitialised_shared", "copy_no_wait"])
def test_unwritten_memory_shows_in_the_result_sanitized(name: str) -> None:
    """Without records, what nothing has written is NaN, and some order of the threads reads it."""
    with pytest.raises(EmulationError, match="elements of output 'output' are as before the call"):
        run(name, fixed=False, sanitize=True)


def test_dependence_on_the_order_of_blocks_is_found() -> None:
    with pytest.raises(EmulationError, match="tensor 0 depends on the order in which blocks and threads run"):
        run("order_of_blocks", fixed=False, repeats=3, deterministic=True)


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("name", [*(FOUND_BY_RECORDS | FOUND_BY_SANITIZERS), "order_of_blocks"])
def test_corrected_twin_passes(name: str, sanitize: bool) -> None:
    deterministic = name != "sum_over_blocks"
    output = run(name, fixed=True, sanitize=sanitize, repeats=3, deterministic=deterministic)
    torch.testing.assert_close(output, expected(name), rtol=1e-6, atol=0)


def test_message_names_the_source_line() -> None:
    with pytest.raises(EmulationError) as caught:
        run("uninitialised_output", fixed=False)
    found = re.search(r"\[tests/cuda_bugs/bugs\.cu:(\d+)", str(caught.value))
    assert found, str(caught.value)
    lines = (Path(__file__).parent / "cuda_bugs" / "bugs.cu").read_text().splitlines()
    assert lines[int(found[1]) - 1].strip() == "output[i] += input[i];"


def test_driver_starts_again_after_a_crash() -> None:
    with pytest.raises(EmulationError, match="ended the driver"):
        run("stack_overflow", fixed=False)
    assert torch.equal(run("stack_overflow", fixed=True), torch.linspace(1, 2, N))


def test_gap_of_a_strided_tensor_may_not_be_touched() -> None:
    """input[:, :8] of [8, 16]: a kernel that takes it for contiguous reads the other half of a row."""
    values = torch.arange(128.0).view(8, 16)[:, :8]
    output, workspace = torch.empty(64), torch.empty(64)
    with (
        emulated(driver="cuda_bugs"),
        pytest.raises(EmulationError, match="'input', which are not the tensor's"),
    ):
        native.call("read_out_of_bounds", output, workspace, values, True)


def test_kernel_may_not_rely_on_torchs_alignment() -> None:
    """A view that begins 4 bytes into its storage arrives 4 bytes off."""
    values = torch.arange(129.0)[1:65]
    output, workspace = torch.empty(64), torch.empty(64)
    with (
        emulated(driver="cuda_bugs", sanitize=True),
        pytest.raises(EmulationError, match="misaligned address"),
    ):
        native.call("misaligned", output, workspace, values, True)


def test_strided_output_comes_back_in_place() -> None:
    values = torch.linspace(1, 2, N)
    storage = torch.zeros(N, 2)
    with (
        emulated(driver="cuda_bugs"),
        pytest.raises(EmulationError, match="'output', which are not the tensor's"),
    ):
        native.call("unwritten_output", storage[:, 0], torch.empty(N), values, True)
    assert storage.eq(0).all(), "a failed call must leave its outputs alone"


def test_calls_that_do_not_fit_are_refused() -> None:
    with emulated(driver="cuda_bugs"):
        with pytest.raises(EmulationError, match="no operator 'nothing'"):
            native.call("nothing", torch.empty(3))
        with pytest.raises(EmulationError, match="takes 3 tensors and 1 scalars, got 2 and 0"):
            native.call("misaligned", torch.empty(3), torch.empty(3))


def test_launches_are_recorded() -> None:
    with emulated(driver="cuda_bugs") as device:
        native.call("sum_over_blocks", torch.empty(N), torch.empty(N), torch.ones(N), True)
    assert [(launch.name, launch.grid, launch.block) for launch in device.launches] == [
        ("zero", (1, 1, 1), (64, 1, 1)),
        ("sum_over_blocks_kernel", (5, 1, 1), (64, 1, 1)),
    ]


def test_missing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(AssertionError, match="'no-such-compiler' is not installed"):
        emulation.build("cuda_bugs", sanitize=False)


# ---- the operations themselves --------------------------------------------------------------------------

FLAVOURS = pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def operate(name: str, *arguments: native.Argument, sanitize: bool = False) -> None:
    with emulated(driver="cuda_bugs", sanitize=sanitize):
        native.call(name, *arguments)


@FLAVOURS
@pytest.mark.parametrize(("amount", "width"), [(1, 32), (3, 8), (7, 16), (31, 32), (0, 2)])
def test_shuffles(amount: int, width: int, sanitize: bool) -> None:
    values = torch.arange(32.0) ** 2
    output = torch.empty(6, 32)
    operate("shuffles", output, values, amount, width, sanitize=sanitize)
    lane = torch.arange(32)
    first = lane // width * width
    up, down, other = lane - amount, lane + amount, lane ^ amount
    sources = [
        first + amount % width,
        torch.where(up >= first, up, lane),
        torch.where(down < first + width, down, lane),
        torch.where(other < first + width, other, lane),
    ]
    for row, source in zip(output, sources, strict=False):
        assert torch.equal(row, values[source])
    groups = values.view(4, 8)
    assert torch.equal(output[4].view(4, 8), groups.sum(1, keepdim=True).expand(4, 8))
    assert torch.equal(output[5].view(4, 8), groups.amax(1, keepdim=True).expand(4, 8))


@FLAVOURS
@pytest.mark.parametrize("which", ["none", "some", "all", "one_half", "second_warp"])
def test_votes(which: str, sanitize: bool) -> None:
    i = torch.arange(64)
    predicate = {
        "none": i < 0,
        "some": i % 3 == 1,
        "all": i >= 0,
        "one_half": (i % 32 >= 16) & (i < 32),
        "second_warp": i >= 32,
    }[which]
    output = torch.empty(7, 64)
    operate("votes", output, predicate.float(), sanitize=sanitize)
    warps, halves = predicate.view(2, 32), predicate.view(4, 16)
    ballot = (warps[:, :16] * 2 ** torch.arange(16)).sum(1)
    assert torch.equal(output[0], ballot.repeat_interleave(32).float())
    assert torch.equal(output[1], warps.any(1).repeat_interleave(32).float())
    assert torch.equal(output[2], warps.all(1).repeat_interleave(32).float())
    assert torch.equal(output[3], halves.any(1).repeat_interleave(16).float())
    assert output[4].eq(float(predicate.any())).all()
    assert output[5].eq(float(predicate.all())).all()
    assert output[6].eq(float(predicate.sum())).all()


def test_numbers_of_blocks_and_threads() -> None:
    output = torch.empty(2 * 2 * 3 * 4 * 3 * 5)
    operate("numbers", output)
    assert torch.equal(output, torch.arange(720.0))


@FLAVOURS
def test_atomics(sanitize: bool) -> None:
    output = torch.zeros(1)
    pairs = torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)
    integers = torch.tensor([0, -5, 500, 0, -1, 0], dtype=torch.int32)
    wide = torch.tensor([7])
    operate("atomics", output, *pairs, integers, wide, sanitize=sanitize)
    assert output.item() == 80
    assert pairs[0].tolist() == [160, 320] and pairs[1].tolist() == [160, 80]
    assert integers.tolist() == [160 * 159 // 2, 159, 0, 255, 77, 320]
    assert wide.item() == 7 + (160 << 32)


@FLAVOURS
@SIXTEEN_BITS
def test_tensor_core_product(dtype: torch.dtype, sanitize: bool) -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=random).to(dtype) for n in (16, 8))
    c, d = torch.randn(16, 8, generator=random), torch.empty(16, 8)
    operate("product", d, a, b, c, sanitize=sanitize)
    exact = a.double() @ b.double() + c.double()
    # Cut off, not rounded: never larger in magnitude than the exact sum, and less than one unit smaller.
    assert (d.double().abs() <= exact.abs()).all()
    assert ((exact - d.double()).abs() <= exact.abs() * 2**-23).all()
    bt = b.t().contiguous()
    operate("product_from_shared", d, a, b, bt, sanitize=sanitize)
    torch.testing.assert_close(d.double(), a.double() @ b.double(), rtol=2**-22, atol=1e-7)


def test_tensor_core_product_tf32() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 8, generator=random) for n in (16, 8))
    c, d = torch.randn(16, 8, generator=random), torch.empty(16, 8)
    operate("product", d, a, b, c)

    def cut(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    exact = cut(a) @ cut(b) + c.double()
    torch.testing.assert_close(d.double(), exact, rtol=2**-22, atol=1e-7)
    assert not torch.allclose(d.double(), a.double() @ b.double() + c.double(), rtol=1e-5, atol=1e-6)


@SIXTEEN_BITS
def test_conversion_rounds_as_pytorch(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    all_16 = torch.arange(-(2**15), 2**15, dtype=torch.int16)[::16].view(dtype).float()  # of every exponent
    anything = torch.randint(-(2**31), 2**31, (4096,), generator=random).to(torch.int32).view(torch.float32)
    ties = torch.cat([all_16 * (1 + 2.0**-e) for e in (8, 9, 11, 12)])
    edges = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519.99, 65520, 65536, 3.4e38]
        + [m * 2.0**e for m in (1, 3) for e in (-24, -25, -26, -126, -149)]
    )
    values = torch.cat([all_16, anything, ties, edges, torch.zeros(4)])  # a multiple of 8
    output, back = torch.empty(len(values), dtype=dtype), torch.empty(len(values))
    operate("convert", output, back, values)
    expected_output = values.to(dtype)
    nan = values.isnan()
    assert torch.equal(output.isnan(), nan)
    assert torch.equal(output.view(torch.int16)[~nan], expected_output.view(torch.int16)[~nan])
    assert torch.equal(back[~nan], expected_output.float()[~nan])


@FLAVOURS
def test_asynchronous_copies(sanitize: bool) -> None:
    values = torch.arange(128.0).view(32, 4)
    output = torch.empty(3, 32, 4)
    operate("copies", output, values, sanitize=sanitize)
    wanted = torch.full((3, 32, 4), -1.0)
    valid = (torch.arange(32) % 2 == 0)[:, None]
    for i, count in enumerate((4, 2, 1)):
        wanted[i, :, :count] = torch.where(valid, values[:, :count], 0.0)
    assert torch.equal(output, wanted)
