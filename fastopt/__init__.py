"""fastopt: optimizers for PyTorch whose whole update is one pass over memory and one launch.

What torch.optim has beside the classes below is torch's own here too (`fastopt.lr_scheduler`, `fastopt.LBFGS`), so that
`import fastopt as optim` does for a script that says `optim` throughout.
"""

from typing import TYPE_CHECKING

import torch.optim

from fastopt.convert import convert
from fastopt.dialects import ImportReport
from fastopt.explain import explain
from fastopt.importers import import_state
from fastopt.info import info
from fastopt.materialize import materialize_state
from fastopt.optimizers.adagrad import Adagrad
from fastopt.optimizers.adam import Adam, AdamW
from fastopt.optimizers.adamax import Adamax
from fastopt.optimizers.lookahead import Lookahead
from fastopt.optimizers.nadam import NAdam
from fastopt.optimizers.radam import RAdam
from fastopt.optimizers.ranger import Ranger
from fastopt.optimizers.rmsprop import RMSprop
from fastopt.optimizers.sgd import SGD
from fastopt.tools.compare import compare
from fastopt.tools.comparison import Comparison

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Comparison",
    "ImportReport",
    "Lookahead",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Ranger",
    "compare",
    "convert",
    "explain",
    "import_state",
    "info",
    "materialize_state",
]

if TYPE_CHECKING:
    from torch.optim import ASGD as ASGD
    from torch.optim import LBFGS as LBFGS
    from torch.optim import Adadelta as Adadelta
    from torch.optim import Adafactor as Adafactor
    from torch.optim import Muon as Muon
    from torch.optim import Optimizer as Optimizer
    from torch.optim import Rprop as Rprop
    from torch.optim import SparseAdam as SparseAdam

    from fastopt import lr_scheduler as lr_scheduler
    from fastopt import swa_utils as swa_utils
else:

    def __getattr__(name):
        if name in torch.optim.__all__:  # of the torch that is installed
            return getattr(torch.optim, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *torch.optim.__all__})
