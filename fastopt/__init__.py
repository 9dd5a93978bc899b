"""fastopt: optimizers for PyTorch whose whole update is one pass over memory and one launch."""

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
