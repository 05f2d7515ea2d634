"""Matrix products and roots of CPU tensors by libraries whose kernels the environment fixes, in place of MKL.

MKL chooses its kernels by the maker of the CPU, and its one branch that is the same everywhere is five times as slow as
AVX2. So products go to oneDNN, batches of products to numpy's OpenBLAS, square roots to numpy: MKL's vector library
computes them from an approximate instruction, whose results differ between CPUs. Everything else keeps torch's kernel.

B matrices in a batch, M and N rows and columns of the result, K terms of each sum.
"""

import functools
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.arithmetic.environment import VARIABLES
from pipeline.errors import UserError

HALF = (torch.bfloat16, torch.float16)  # multiplied in float32 and rounded: few CPUs have arithmetic for them


@functools.cache
def use_portable_kernels() -> torch.library.Library:
    """Register the functions below as torch's kernels on the CPU, for the rest of the process. Raises UserError if the
    environment did not fix the libraries' kernels before they were loaded."""
    differing = [f"{name}={value}" for name, value in VARIABLES.items() if os.environ.get(name) != value]
    if differing or torch.backends.cpu.get_cpu_capability() != "AVX2":
        raise UserError(
            "train.arithmetic = portable: torch or numpy was loaded before its kernels were chosen; import "
            f"pipeline.stages first, or set {' '.join(differing or ['ATEN_CPU_CAPABILITY=avx2'])} before Python starts"
        )
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # about replaced kernels
        for name, kernel in KERNELS.items():
            library.impl(name, kernel, "CPU")
    # the fused attention calls MKL by itself; without it, attention is batches of products
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's too, whatever the name says
    return library


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N]."""
    if a.dtype in HALF:
        return mm(a.float(), b.float()).to(a.dtype)
    if _unfit(a, b):
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))  # with `out=` the kernel is still torch's
    return _linear(a, b)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a @ b, c [M, N] or of a shape that broadcasts to it."""
    if beta == alpha == 1 and c.shape == b.shape[1:] and a.dtype == c.dtype == torch.float32 and not _unfit(a, b):
        return _linear(a, b, c)
    return _add(c, mm(a, b), beta, alpha)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] @ b [B, K, N] -> [B, M, N]."""
    if a.dtype in HALF:
        return bmm(a.float(), b.float()).to(a.dtype)
    if _unfit(a, b):
        return torch.bmm(a, b, out=a.new_empty(*a.shape[:2], b.shape[2]))
    with np.errstate(all="ignore"):  # torch does not warn of non-finite values either
        return torch.from_numpy(np.matmul(a.detach().numpy(), b.detach().numpy()))


def baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a @ b, c [B, M, N] or of a shape that broadcasts to it."""
    return _add(c, bmm(a, b), beta, alpha)


def sqrt(x: Tensor) -> Tensor:
    """The square root, rounded as IEEE 754 requires."""
    if x.dtype not in (torch.float32, torch.float64):
        return torch.sqrt(x, out=torch.empty_like(x, dtype=x.dtype if x.is_floating_point() else torch.float32))
    root = torch.empty_like(x)
    with np.errstate(all="ignore"):
        np.sqrt(x.detach().numpy(), out=root.numpy())
    return root


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent. torch computes x^0.5 as a square root."""
    if exponent == 0.5 and x.is_floating_point():
        return sqrt(x)
    return torch.pow(x, exponent, out=x.new_empty(x.shape, dtype=torch.result_type(x, exponent)))


def _unfit(a: Tensor, b: Tensor) -> bool:
    """Whether torch's own kernel computes this product: a type other than float32, or nothing to add up."""
    return a.dtype != torch.float32 or b.dtype != torch.float32 or not a.numel() or not b.numel()


def _linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _add(c: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    scaled = product if alpha == 1 else product.mul_(alpha)
    return scaled if beta == 0 else scaled.add_(c, alpha=beta)


# by torch's names; the variants with `out=` keep torch's kernels
KERNELS: dict[str, Callable[..., Tensor]] = {
    "mm": mm,
    "addmm": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "sqrt": sqrt,
    "sqrt_": lambda x: x.copy_(sqrt(x)),
    "pow.Tensor_Scalar": power,
    "pow_.Scalar": lambda x, exponent: x.copy_(power(x, exponent)),
}
