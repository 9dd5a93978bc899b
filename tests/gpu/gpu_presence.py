"""Whether there is a GPU to test, or why not. Nothing of fastopt is imported here."""

from __future__ import annotations

import os

import torch

# FASTOPT_TEST_DEVICE=cpu is a rehearsal: it runs what these tests do, CUDA's own features aside, where there is no GPU,
# with the CUDA driver's emulator in the place of Triton.
DEVICE = os.environ.get("FASTOPT_TEST_DEVICE", "cuda")
REQUIRED = os.environ.get("FASTOPT_REQUIRE_GPU") == "1"
ABSENT = "" if torch.cuda.is_available() or DEVICE == "cpu" or REQUIRED else "torch sees no CUDA device"
