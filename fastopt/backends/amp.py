"""What a GradScaler leaves to the kernels: the loss scale of the gradients, and whether one of them overflowed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Amp:
    """Both as torch's scaler hands them over, one-element tensors on some device; absent when it is not used."""

    scale: Tensor | None = None
    found_inf: Tensor | None = None
    _copies: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def addresses(self, device: str) -> tuple[int, int]:
        """Where `found_inf` and `scale` lie on a device as float32, 0 for what is absent."""
        return self._address("found_inf", self.found_inf, device), self._address("scale", self.scale, device)

    def _address(self, name: str, tensor: Tensor | None, device: str) -> int:
        if tensor is None:
            return 0
        key = (name, device)
        if key not in self._copies:
            self._copies[key] = tensor.to(device=device, dtype=torch.float32, non_blocking=True)
        return self._copies[key].data_ptr()


NONE = Amp()
"""No scaler."""
