"""Hyper-parameters of training, learned by the validation loss: decay, smoothing, augmentation, weights of tasks."""

from bilevel.problems.hyperparameters.augmentation import Augmentation, Noise, RandomBrightness, RandomShift, uniform
from bilevel.problems.hyperparameters.base import Hyperparameter
from bilevel.problems.hyperparameters.label_smoothing import LabelSmoothing
from bilevel.problems.hyperparameters.per_parameter import PerParameter
from bilevel.problems.hyperparameters.problems import Hyperparameters, Tuned
from bilevel.problems.hyperparameters.tasks import Tasks, TaskWeights
from bilevel.problems.hyperparameters.weight_decay import WeightDecay

__all__ = [
    "Augmentation",
    "Hyperparameter",
    "Hyperparameters",
    "LabelSmoothing",
    "Noise",
    "PerParameter",
    "RandomBrightness",
    "RandomShift",
    "TaskWeights",
    "Tasks",
    "Tuned",
    "WeightDecay",
    "uniform",
]
