"""A process of `test_statistics_shared_by_processes`; run by torchrun."""

import torch
from torch import distributed

import trt_kernels as tk
from tests.cases import relative_error


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    whole = (torch.randn(4, 7, 5, 3, 3) * 2 + 3).requires_grad_()
    grad = torch.randn(whole.shape)
    rows = slice(0, 5) if rank == 0 else slice(5, 7)
    expected = tk.nn.BatchNormLIF(5, surrogate=tk.ATan())
    shared = tk.nn.BatchNormLIF(5, surrogate=tk.ATan(), process_group=distributed.group.WORLD)
    theirs = expected(whole)
    theirs.backward(grad)
    part = whole.detach()[:, rows].clone().requires_grad_()
    ours = shared(part)
    ours.backward(grad[:, rows])
    assert torch.equal(ours, theirs[:, rows])
    assert relative_error(part.grad, whole.grad[:, rows]) < 1e-5
    for parameter, other in zip(shared.parameters(), expected.parameters(), strict=True):
        distributed.all_reduce(parameter.grad)
        assert relative_error(parameter.grad, other.grad) < 1e-5
    for buffer, other in zip(shared.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    # A process may have nothing of a batch.
    empty = part.detach()[:, : 2 * rank].requires_grad_()
    shared(empty).sum().backward()
    print("the same")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
