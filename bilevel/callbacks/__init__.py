"""What watches a run without taking part in it."""

from bilevel.callbacks.base import Callback
from bilevel.callbacks.best_model import BestModel
from bilevel.callbacks.checkpoints import Checkpoints
from bilevel.callbacks.csv_log import CSVLog
from bilevel.callbacks.early_stopping import EarlyStopping
from bilevel.callbacks.history import History
from bilevel.callbacks.hypergradient_monitor import HypergradientMonitor
from bilevel.callbacks.json_lines_log import JSONLinesLog
from bilevel.callbacks.learning_rate_monitor import LearningRateMonitor
from bilevel.callbacks.progress import Progress
from bilevel.callbacks.run_plot import RunPlot
from bilevel.callbacks.tensorboard import TensorBoard
from bilevel.callbacks.weights_and_biases import WeightsAndBiases

__all__ = [
    "BestModel",
    "CSVLog",
    "Callback",
    "Checkpoints",
    "EarlyStopping",
    "History",
    "HypergradientMonitor",
    "JSONLinesLog",
    "LearningRateMonitor",
    "Progress",
    "RunPlot",
    "TensorBoard",
    "WeightsAndBiases",
]
