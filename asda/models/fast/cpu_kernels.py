"""What of a training step in bf16 is not a product of matrices, for CPUs: each kernel goes over memory once.

torch computes these row by row as well, but one operation at a time, and at this size every operation costs a way to
memory and back. Each kernel here does for a row of bf16 all that its definition (asda/models/fast/ops.py, beside every
call) does for it, in fp32, and rounds the results. numba compiles them at first use and keeps what it compiled.

The rows are parted among the threads that torch's own products use: a second pool of threads would fight with the
first, whose threads wait by spinning. That takes the OpenMP library inside torch's wheel; where it is not, `AVAILABLE`
is false and the definitions are used.

Shapes: R rows, D features of a row, P parts (threads), M maps, N tokens. bf16 numbers are uint16 here.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# numba compiles other signatures than pyright reads.

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.typing import signature
from numba.extending import intrinsic
from torch import Tensor

LIBGOMP = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
AVAILABLE = LIBGOMP.is_file()
# Sums may be taken in any order, and a product and a sum in one instruction; nan and inf stay what they are.
FAST = {"reassoc", "contract", "arcp", "nsz"}
ARGUMENTS = types.void(types.CPointer(types.voidptr))  # int64 sizes, float64 numbers, then a pointer for each tensor
LANES = 16  # fp32 numbers in a register; rows are padded to it where the end of a row would cost as much as the rest

if AVAILABLE:
    _gomp = ctypes.CDLL(str(LIBGOMP))
    for _name in ("omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(_name, ctypes.cast(getattr(_gomp, _name), ctypes.c_void_p).value)
_thread_num = types.ExternalFunction("omp_get_thread_num", signature(types.int32))
_num_threads = types.ExternalFunction("omp_get_num_threads", signature(types.int32))


def launch(kernel: Callable[..., None], sizes: list[int], numbers: list[float], *tensors: Tensor) -> None:
    """Run a kernel on all of torch's threads, and return when all are done; other Python threads go on meanwhile."""
    arrays = np.array(sizes, np.int64), np.array(numbers, np.float64)
    pointers = [array.ctypes.data for array in arrays] + [tensor.data_ptr() for tensor in tensors]
    arguments = (ctypes.c_void_p * len(pointers))(*pointers)
    _gomp.GOMP_parallel(_address(kernel), arguments, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))


@functools.cache
def _address(kernel: Callable[..., None]) -> ctypes.c_void_p:
    return ctypes.c_void_p(cfunc(ARGUMENTS, fastmath=FAST, error_model="numpy", cache=True)(kernel).address)


@njit(inline="always")
def _sizes(pointers, number):
    return carray(pointers[0], (number,), np.int64)


@njit(inline="always")
def _number(pointers):
    return np.float32(carray(pointers[1], (1,), np.float64)[0])


@njit(inline="always")
def _bf16(pointer, rows, width):
    return carray(pointer, (rows, width), np.uint16)


@njit(inline="always")
def _fp32(pointer, rows, width):
    return carray(pointer, (rows, width), np.float32)


@njit(inline="always")
def _sums(pointer, part, number, width, dtype):
    """The sums of one thread, [number, D]."""
    return carray(pointer, (part + 1, number, width), dtype)[part]


@njit(inline="always")
def _rows_of_this_thread(num_rows):
    part, parts = _thread_num(), _num_threads()
    return part, num_rows * part // parts, num_rows * (part + 1) // parts


# Numbers -------------------------------------------------------------------------------------------------------------


@intrinsic
def _float_of(typing_context: Any, bits: Any):
    """The fp32 number with these 32 bits."""
    return types.float32(types.uint32), lambda _context, builder, _signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _bits_of(typing_context: Any, number: Any):
    """The 32 bits of an fp32 number."""
    return types.uint32(types.float32), lambda _context, builder, _signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@njit(inline="always")
def _wide(bf16):
    """The fp32 number that a bf16 number is: its upper half."""
    return _float_of(np.uint32(np.uint32(bf16) << np.uint32(16)))


@njit(inline="always")
def _narrow(number):
    """The nearest bf16 number, the even one of two; nan stays nan as long as its upper half says so, as torch's do."""
    bits = _bits_of(number)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def _exp(x):
    """e^x for x <= 0, within 5e-5 of itself, a fortieth of bf16's rounding; 0 below -88.

    It is 2^(n + f): n becomes the exponent, and a polynomial gives 2^f.
    """
    power = x * np.float32(1.4426950408889634)
    power = np.float32(-127) if power < np.float32(-127) else power  # nan passes
    whole = np.int32(power - np.float32(0.5))  # towards 0: the nearest, of numbers that are not positive
    f = (power - np.float32(whole)) * np.float32(0.6931471805599453)  # |f| <= 0.35: the next term is f^5 / 120
    series = np.float32(0.5) + f * (np.float32(1 / 6) + f * np.float32(1 / 24))
    series = np.float32(1) + f * (np.float32(1) + f * series)
    return series * _float_of(np.uint32((whole + np.int32(127)) << np.int32(23)))


# GELU ----------------------------------------------------------------------------------------------------------------


@njit(inline="always")
def _normal(x):
    """The normal distribution of x: its integral up to x, and its density; each within 1e-4 of itself.

    The tail beyond |x| is exp(-x^2 / 2) times a smooth function, here a polynomial in 1 / (1 + 3/8 |x|) (the form of
    Hastings, 1955) whose largest relative error, 3.1e-5, was made as small as it can be.
    """
    t = np.float32(1) / (np.float32(1) + np.float32(0.375) * abs(x))
    bell = _exp(np.float32(-0.5) * x * x)
    series = np.float32(0.08356451) + t * (np.float32(0.20028104) + t * np.float32(-0.09064253))
    series = t * (np.float32(0.14906104) + t * (np.float32(0.15773385) + t * series))
    tail = bell * series
    return (tail if x < np.float32(0) else np.float32(1) - tail), np.float32(0.3989422804014327) * bell


def gelu_backward(a):
    """Sizes R, D; x_RD, dy_RD -> dx_RD, which lies where dy_RD lay, and gelu(x)_RD."""
    rows, width = _sizes(a, 2)
    x, dy, y = _bf16(a[2], rows, width), _bf16(a[3], rows, width), _bf16(a[4], rows, width)
    _, first, last = _rows_of_this_thread(rows)
    for r in range(first, last):
        for d in range(width):
            number = _wide(x[r, d])
            below, density = _normal(number)
            y[r, d] = _narrow(number * below)
            dy[r, d] = _narrow(_wide(dy[r, d]) * (below + number * density))


# Norms over the features of a row ------------------------------------------------------------------------------------


@njit(inline="always")
def _moments(row_D, eps):
    """Mean and reciprocal deviation of a row in fp32."""
    share = np.float32(1) / np.float32(len(row_D))
    total = np.float32(0)
    for d in range(len(row_D)):
        total += row_D[d]
    mean = total * share
    square = np.float32(0)
    for d in range(len(row_D)):
        square += (row_D[d] - mean) * (row_D[d] - mean)
    return mean, np.float32(1) / np.sqrt(square * share + eps)


@njit(inline="always")
def _norm_backward(dnormed_D, normed_D, rstd, dx_D):
    """Dx of x -> (x - mean) * rstd, from the gradient of the result and the result."""
    share = np.float32(1) / np.float32(len(normed_D))
    total, along = np.float32(0), np.float32(0)
    for d in range(len(normed_D)):
        total += dnormed_D[d]
        along += dnormed_D[d] * normed_D[d]
    total, along = total * share, along * share
    for d in range(len(normed_D)):
        dx_D[d] = _narrow(rstd * (dnormed_D[d] - total - normed_D[d] * along))


def norm(a):
    """Sizes R, D, whether there is a residual; numbers eps; x_RD, residual_RD, w_D, b_D -> sum_RD, y_RD, moments_R2."""
    rows, width, adds = _sizes(a, 3)
    eps = _number(a)
    x, residual = _bf16(a[2], rows, width), _bf16(a[3], rows, width)
    weight, bias = _bf16(a[4], 1, width)[0], _bf16(a[5], 1, width)[0]
    summed, y = _bf16(a[6], rows, width), _bf16(a[7], rows, width)
    moments = _fp32(a[8], rows, 2)
    row = np.empty(width, np.float32)
    _, first, last = _rows_of_this_thread(rows)
    for r in range(first, last):
        if adds:
            for d in range(width):
                rounded = _narrow(_wide(x[r, d]) + _wide(residual[r, d]))
                summed[r, d] = rounded
                row[d] = _wide(rounded)
        else:
            for d in range(width):
                row[d] = _wide(x[r, d])
        mean, rstd = _moments(row, eps)
        moments[r, 0], moments[r, 1] = mean, rstd
        for d in range(width):
            y[r, d] = _narrow((row[d] - mean) * rstd * _wide(weight[d]) + _wide(bias[d]))


def norm_backward(a):
    """Sizes R, D; x_RD, dy_RD, w_D, moments_R2 -> dx_RD, and this thread's share of dw and db added to sums_P2D."""
    rows, width = _sizes(a, 2)
    x, dy = _bf16(a[2], rows, width), _bf16(a[3], rows, width)
    weight, moments = _bf16(a[4], 1, width)[0], _fp32(a[5], rows, 2)
    dx = _bf16(a[6], rows, width)
    part, first, last = _rows_of_this_thread(rows)
    dweight, dbias = _sums(a[7], part, 2, width, np.float32)
    normed, dnormed = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(first, last):
        mean, rstd = moments[r, 0], moments[r, 1]
        for d in range(width):
            slope = _wide(dy[r, d])
            normed[d] = (_wide(x[r, d]) - mean) * rstd
            dnormed[d] = slope * _wide(weight[d])
            dweight[d] += slope * normed[d]
            dbias[d] += slope
        _norm_backward(dnormed, normed, rstd, dx[r])


def norm_gelu(a):
    """Sizes R, D, whether there is a residual; numbers eps; x_RD, residual_RD -> y_RD, moments_R2."""
    rows, width, adds = _sizes(a, 3)
    eps = _number(a)
    x, residual = _bf16(a[2], rows, width), _bf16(a[3], rows, width)
    y, moments = _bf16(a[4], rows, width), _fp32(a[5], rows, 2)
    row = np.empty(width, np.float32)
    _, first, last = _rows_of_this_thread(rows)
    for r in range(first, last):
        for d in range(width):
            row[d] = _wide(x[r, d])
        mean, rstd = _moments(row, eps)
        moments[r, 0], moments[r, 1] = mean, rstd
        for d in range(width):
            normed = (row[d] - mean) * rstd
            row[d] = normed * _normal(normed)[0]
        if adds:
            for d in range(width):
                y[r, d] = _narrow(row[d] + _wide(residual[r, d]))
        else:
            for d in range(width):
                y[r, d] = _narrow(row[d])


def norm_gelu_backward(a):
    """Sizes R, D; x_RD, dy_RD, moments_R2 -> dx_RD."""
    rows, width = _sizes(a, 2)
    x, dy = _bf16(a[2], rows, width), _bf16(a[3], rows, width)
    moments, dx = _fp32(a[4], rows, 2), _bf16(a[5], rows, width)
    normed, dnormed = np.empty(width, np.float32), np.empty(width, np.float32)
    _, first, last = _rows_of_this_thread(rows)
    for r in range(first, last):
        mean, rstd = moments[r, 0], moments[r, 1]
        for d in range(width):
            normed[d] = (_wide(x[r, d]) - mean) * rstd
            below, density = _normal(normed[d])
            dnormed[d] = _wide(dy[r, d]) * (below + normed[d] * density)
        _norm_backward(dnormed, normed, rstd, dx[r])


# Losses --------------------------------------------------------------------------------------------------------------


def masked_error(a):
    """Sizes R, D, C rows of targets, M; pred_RD, target_CD, masked_R (uint8) -> sums_P3D in fp64.

    The sums are over the masked rows: of the squared error, of the predictions, of their squares. The prediction in row
    r = (b M + m) N + n has the target b N + n.
    """
    rows, width, num_targets, students, patches = _sizes(a, 5)
    pred, target = _bf16(a[2], rows, width), _fp32(a[3], num_targets, width)
    masked = carray(a[4], rows, np.uint8)
    part, first, last = _rows_of_this_thread(rows)
    error, total, square = _sums(a[5], part, 3, width, np.float64)
    for r in range(first, last):
        if masked[r]:
            t = r // (students * patches) * patches + r % patches
            for d in range(width):
                number = _wide(pred[r, d])
                difference = number - target[t, d]
                error[d] += difference * difference
                total[d] += number
                square[d] += number * number


def masked_error_backward(a):
    """As masked_error; numbers factor -> dpred_RD = factor * (pred - target) where masked, else 0."""
    rows, width, num_targets, students, patches = _sizes(a, 5)
    factor = _number(a)
    pred, target = _bf16(a[2], rows, width), _fp32(a[3], num_targets, width)
    masked, dpred = carray(a[4], rows, np.uint8), _bf16(a[5], rows, width)
    _, first, last = _rows_of_this_thread(rows)
    for r in range(first, last):
        if masked[r]:
            t = r // (students * patches) * patches + r % patches
            for d in range(width):
                dpred[r, d] = _narrow(factor * (_wide(pred[r, d]) - target[t, d]))
        else:
            for d in range(width):
                dpred[r, d] = 0


# Maps of attention ---------------------------------------------------------------------------------------------------


@njit(inline="always")
def _highest(row_N):
    """The largest number of a row, or nan: as integers, whose order is that of the numbers, below 0 turned round."""
    highest = np.int16(-32768)
    for n in range(len(row_N)):
        bits = np.int16(row_N[n])
        highest = max(highest, np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(32767))))
    return _wide(np.uint16(highest ^ ((highest >> np.int16(15)) & np.int16(32767))))


@njit(inline="always")
def _softmax(logits_N, padded):
    """Softmax of a row into `padded`, whose length is a multiple of LANES; beyond the row it holds zeros."""
    highest = _highest(logits_N)
    for n in range(len(logits_N)):
        padded[n] = _wide(logits_N[n]) - highest
    for n in range(len(logits_N), len(padded)):
        padded[n] = np.float32(-np.inf)
    total = np.float32(0)
    for n in range(len(padded)):
        padded[n] = _exp(padded[n])
        total += padded[n]
    share = np.float32(1) / total
    for n in range(len(padded)):
        padded[n] *= share


def maps_and_difference(a):
    """Sizes R, N, maps; numbers lambda; logits_MRN -> maps_MRN, difference_RN."""
    rows, width, num_maps = _sizes(a, 3)
    lam = _number(a)
    logits, maps = _bf16(a[2], num_maps * rows, width), _bf16(a[3], num_maps * rows, width)
    difference = _bf16(a[4], rows, width)
    size = (width + LANES - 1) // LANES * LANES
    first_map, second_map = np.empty(size, np.float32), np.empty(size, np.float32)
    _, first, last = _rows_of_this_thread(rows)
    for r in range(first, last):
        _softmax(logits[r], first_map)
        for n in range(width):
            maps[r, n] = _narrow(first_map[n])
        if num_maps == 2:
            _softmax(logits[rows + r], second_map)
            for n in range(width):
                maps[rows + r, n] = _narrow(second_map[n])
                difference[r, n] = _narrow(first_map[n] - lam * second_map[n])


def maps_backward(a):
    """Sizes R, N, maps; numbers lambda; maps_MRN, ddifference_RN -> dlogits_MRN, difference_RN.

    With dA the gradient of A = P1 - lambda P2: dL1 = P1 (dA - rowsum(P1 dA)), dL2 = P2 (dA - rowsum(P2 dA)), whose
    factor -lambda is left to the products that follow. A itself is computed once more; it may lie where dA lay.
    """
    rows, width, num_maps = _sizes(a, 3)
    lam = _number(a)
    maps, dlogits = _bf16(a[2], num_maps * rows, width), _bf16(a[4], num_maps * rows, width)
    ddifference, difference = _bf16(a[3], rows, width), _bf16(a[5], rows, width)
    slope, weight = np.empty(width, np.float32), np.empty(width, np.float32)
    _, first, last = _rows_of_this_thread(rows)
    for r in range(first, last):
        for n in range(width):
            slope[n] = _wide(ddifference[r, n])
        for m in range(num_maps):
            along = np.float32(0)
            for n in range(width):
                weight[n] = _wide(maps[m * rows + r, n])
                along += weight[n] * slope[n]
            for n in range(width):
                dlogits[m * rows + r, n] = _narrow(weight[n] * (slope[n] - along))
        if num_maps == 2:
            for n in range(width):
                difference[r, n] = _narrow(_wide(maps[r, n]) - lam * weight[n])
