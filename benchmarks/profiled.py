"""The backward kernels of `lif` and `batch_norm_lif`, for ncu to watch.

`python -m benchmarks.profiled [DEVICE]`
"""

import sys

import torch

import trt_kernels as tk

# [T, B, C, H, W]: on a GPU 128 MB of float32; elsewhere nothing is watched.
SHAPES = {"cuda": (4, 32, 64, 64, 64), "cpu": (4, 2, 3, 4, 4)}


def main(device: str = "cuda") -> int:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SHAPES[device], device=device).to(dtype).requires_grad_()
        grad = torch.randn_like(x)
        torch.autograd.grad(tk.lif(x), x, grad)
        weight, bias = torch.ones(x.shape[2], device=device), torch.zeros(x.shape[2], device=device)
        torch.autograd.grad(tk.batch_norm_lif(x, None, None, weight, bias, True), x, grad)
        print(f"lif and batch_norm_lif, {dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
