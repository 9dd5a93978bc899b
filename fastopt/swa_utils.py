"""torch.optim.swa_utils itself, for `from fastopt.swa_utils import AveragedModel`."""

import sys

from torch.optim import swa_utils
from torch.optim.swa_utils import *  # noqa: F403 (for type checkers: what is imported is the module itself)

sys.modules[__name__] = swa_utils
