"""Lists the operators that calls dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Lists the operators that are dispatched, but for those that compute no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operator is not torch.ops.aten.promote_types.default:
            self.names.append(str(operator))
        return operator(*arguments, **(named or {}))
