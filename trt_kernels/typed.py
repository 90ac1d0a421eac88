"""`Function` of PyTorch, which leaves its `apply` without types."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        @classmethod
        def apply(cls, *arguments: Any) -> Any: ...
else:
    Function = torch.autograd.Function
