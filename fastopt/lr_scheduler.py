"""torch.optim.lr_scheduler itself, for `from fastopt.lr_scheduler import StepLR`."""

import sys

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import *  # noqa: F403 (for type checkers: what is imported is the module itself)

sys.modules[__name__] = lr_scheduler
