"""Costs of a network, counted from shapes alone: parameters, arithmetic of a clip and memory of training.

And the rate of a machine in products of large matrices, against which the throughput of a step is measured.
"""

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asda.config.model import AstConfig, ClassifyConfig, ModelConfig, PretrainConfig, of_asda
from asda.config.run import EngineConfig
from asda.models.attention import set_attention_path
from asda.models.classifier import Classifier
from asda.models.pretrain import MaskedStudents, Teacher

PREFIXES = ["", "k", "M", "G", "T", "P", "E", "Z"]
SMALLEST_GEMM = 256
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns: hundreds of operations for every byte of memory
GEMM_TIME_S = 0.25  # least time for timed products
MIN_PRODUCTS = 3  # one takes 0.1 to 0.2 s in fp32 on a slow core


class Network(NamedTuple):
    """Trainable parameters by part, and floating-point operations of one clip (a product and its sum are two)."""

    parameters: dict[str, int]
    flops: dict[str, int]


def network_costs(
    model: ModelConfig | AstConfig, objective: PretrainConfig | ClassifyConfig, frames: int, classes: int
) -> Network:
    """Count a training step of one clip: forward and backward of the trained module, forward of the teacher.

    Only products of matrices and convolutions count, as is usual. Attention counts as its definition, whichever path
    computes it. A clip has so many log-mel frames; `classes` is not used in pre-training.
    """
    num_patches = (frames // model.patch) * (model.mel_bins // model.patch)
    with torch.device("meta"):  # tensors with a shape and no content
        patches_BNP = torch.empty(1, num_patches, model.patch**2)
        if isinstance(objective, PretrainConfig):
            return _pretraining(of_asda(model), objective, patches_BNP)
        classifier = Classifier(model, objective, classes)
        flops = {"forward and backward": _flops(lambda: classifier(patches_BNP).sum().backward(), classifier)}
        ham = {"ham": size} if (size := _size(classifier.ham)) else {}
        head = {"head": _size(classifier.norm) + _size(classifier.head)}
        return Network({"encoder": _size(classifier.encoder)} | ham | head, flops)


def _pretraining(model: ModelConfig, objective: PretrainConfig, patches_BNP: torch.Tensor) -> Network:
    students, num_patches = MaskedStudents(model, objective), patches_BNP.shape[1]
    teacher = Teacher(students.encoder, objective.target_layers)
    visible_BMK = torch.zeros(1, objective.students, objective.mask.visible(num_patches), dtype=torch.int64)
    targets_BND = torch.empty(1, num_patches, model.width)
    grid = (-1, model.mel_bins // model.patch)
    tokens_STFD = torch.empty(objective.students, num_patches, model.width).unflatten(1, grid).requires_grad_()
    inputs = patches_BNP, visible_BMK, targets_BND, targets_BND[:, 0]
    whole = _flops(lambda: students(*inputs).total.backward(), students)
    decoder = _flops(lambda: students.decoder(tokens_STFD).sum().backward(), students)
    watching = _flops(lambda: teacher.targets(patches_BNP), teacher)
    sizes = {"encoder": _size(students.encoder), "decoder": _size(students.decoder)}
    return Network(sizes, {"students": whole - decoder, "decoder": decoder, "teacher": watching})


def in_flop(count: float) -> str:
    """Format a number of operations with four digits and a prefix: 1.175 TFLOP."""
    power = min(int(math.log10(max(count, 1))) // 3, len(PREFIXES) - 1)
    return f"{count / 1000**power:.4g} {PREFIXES[power]}FLOP"


def rank_memory(trained: int, followed: int, engine: EngineConfig, world_size: int) -> dict[str, int]:
    """Count bytes on the device of each rank, by content; without activations and DeepSpeed's buffers.

    The `followed` parameters are the teacher's (0 without one). The ZeRO paper counts the same (Rajbhandari et al.,
    2020, figure 1), without the teacher and with gradients that add up in bf16; here they add up in fp32 from stage 1.
    One rank in fp32 needs no averages beside the teacher. An offloaded optimizer is not on the device.
    """
    stage, size = engine.zero_stage, 4 if engine.precision == "fp32" else 2
    no_master, no_averages = stage == 0 and size == 4, world_size == 1 and size == 4
    parts = {  # bytes, and whether the ranks share them
        "weights": (size * trained, stage == 3),
        "gradients": ((4 if stage else size) * trained, stage >= 2),
        "master and moments": (0 if engine.offload_optimizer else (8 if no_master else 12) * trained, stage >= 1),
        "averages": (0 if no_averages else 4 * followed, True),
        "teacher": (size * followed, False),
    }
    return {name: -(-total // world_size) if partitioned else total for name, (total, partitioned) in parts.items()}


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations a second of the device in a product of two large matrices.

    The matrices grow until a product takes long enough to be timed: bf16 on a CPU without bf16 instructions is a
    thousand times slower than elsewhere. Then products are timed for a quarter of a second, at least three; the median
    counts. The matrices are normal: zeros would draw less power and run faster. On a CPU this process's threads work,
    so ranks that share a machine should measure together. In fp32, torch.backends decides about TF32.
    """
    own = torch.Generator(device).manual_seed(0)  # leaves the run's generator as it is
    size = SMALLEST_GEMM
    while True:
        a, b = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        _timed_product_s(a, b, out)
        times_s = [_timed_product_s(a, b, out)]
        if size == GEMM_SIZE[device.type] or times_s[0] > GEMM_TIME_S / MIN_PRODUCTS:
            break
        size *= 2
    while len(times_s) < MIN_PRODUCTS or sum(times_s) < GEMM_TIME_S:
        times_s.append(_timed_product_s(a, b, out))
    return 2 * size**3 / median(times_s)


def _timed_product_s(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, b.t(), out=out)  # the layout of a linear layer; bf16 without it is slow on some CPUs
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops(work: Callable[[], Any], module: nn.Module) -> int:
    set_attention_path(module, "explicit")
    formulas = {torch.ops.aten.convolution_backward: _conv_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def _conv_backward(grad_shape: Any, x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Count each wanted gradient as one forward; torch's own formula forgets the groups in one of them."""
    wants_input, wants_weight, _ = args[-1]
    return 2 * grad_shape[0] * math.prod(grad_shape[2:]) * math.prod(w_shape) * (wants_input + wants_weight)
