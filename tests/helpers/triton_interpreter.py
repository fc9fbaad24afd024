"""Runs attention's Triton kernels on CPU tensors: TRITON_INTERPRET=1 python triton_interpreter.py cases.pt results.pt

A program of its own, because Triton decides at its import whether kernels are interpreted, for the whole process.
A case is a dict of qk_2BGNE, v_BHNE, lam, present_BN and d_mixed_BHNE; its result a list: what attend gives, then the
gradients of qk, v and, where it is a tensor, lam.
"""

import sys

import torch

from asda.models.attention import attend


def run(case: dict) -> list[torch.Tensor]:
    """One case, forward and backward."""
    d_mixed_BHNE, present_BN = case.pop("d_mixed_BHNE"), case.pop("present_BN")
    inputs = {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    mixed_BHNE = attend(**inputs, present_BN=present_BN, path="triton")
    wanted = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    return [mixed_BHNE.detach(), *torch.autograd.grad(mixed_BHNE, wanted, d_mixed_BHNE)]


if __name__ == "__main__":
    cases, results = sys.argv[1:]
    torch.save([run(case) for case in torch.load(cases)], results)
