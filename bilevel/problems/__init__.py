"""Problems: the levels of a nested structure, as users declare them, and ready-made ones, one family a file."""

from bilevel.data import Indexed
from bilevel.data.episodes import Episodes, FunctionEpisodes, TaskBatch, split_classes
from bilevel.problems.analytic import Analytic, NestedQuadratic, Quadratic, Ridge, Variable, with_spectrum
from bilevel.problems.base import Problem
from bilevel.problems.constraints import Ball, Box, Constrained, ConstrainedTraining, Constraint, Simplex
from bilevel.problems.coreset import Coreset, CoresetTraining
from bilevel.problems.distillation import Distillation, DistilledTraining, SyntheticSet, redraw
from bilevel.problems.few_shot import Adaptation, Assessment, MetaLearner, PrototypeMetaLearner
from bilevel.problems.hyperparameters import (
    Augmentation,
    Hyperparameter,
    Hyperparameters,
    LabelSmoothing,
    Noise,
    RandomBrightness,
    RandomShift,
    Tasks,
    TaskWeights,
    Tuned,
    WeightDecay,
)
from bilevel.problems.learning_rates import LearningRate, Paced
from bilevel.problems.mixture import BalancedBatches, DomainWeights, Mixture, Sources
from bilevel.problems.supervised import Training, Validation, counterpart

__all__ = [
    "Adaptation",
    "Analytic",
    "Assessment",
    "Augmentation",
    "BalancedBatches",
    "Ball",
    "Box",
    "Constrained",
    "ConstrainedTraining",
    "Constraint",
    "Coreset",
    "CoresetTraining",
    "Distillation",
    "DistilledTraining",
    "DomainWeights",
    "Episodes",
    "FunctionEpisodes",
    "Hyperparameter",
    "Hyperparameters",
    "Indexed",
    "LabelSmoothing",
    "LearningRate",
    "MetaLearner",
    "Mixture",
    "NestedQuadratic",
    "Noise",
    "Paced",
    "Problem",
    "PrototypeMetaLearner",
    "Quadratic",
    "RandomBrightness",
    "RandomShift",
    "Ridge",
    "Simplex",
    "Sources",
    "SyntheticSet",
    "TaskBatch",
    "TaskWeights",
    "Tasks",
    "Training",
    "Tuned",
    "Validation",
    "Variable",
    "WeightDecay",
    "counterpart",
    "redraw",
    "split_classes",
    "with_spectrum",
]
