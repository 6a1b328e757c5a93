"""Problems: the levels of a nested structure, as users declare them, and ready-made ones, one family a file."""

from bilevel.data import Indexed
from bilevel.data.episodes import Episodes, FunctionEpisodes, TaskBatch, split_classes
from bilevel.problems.analytic import Analytic, NestedQuadratic, Quadratic, Ridge, Variable, with_spectrum
from bilevel.problems.architecture import Architecture, SupernetTraining, discretise, genotype
from bilevel.problems.base import Problem
from bilevel.problems.constraints import Ball, Box, Constrained, ConstrainedTraining, Constraint, Simplex
from bilevel.problems.coreset import Coreset, CoresetTraining
from bilevel.problems.distillation import Distillation, DistilledTraining, SyntheticSet, redraw
from bilevel.problems.few_shot import Adaptation, Assessment, MetaLearner, PrototypeMetaLearner
from bilevel.problems.games import (
    AdversarialTraining,
    Firm,
    Perturbation,
    Player,
    QuantityGame,
    RobustValidation,
    attack,
)
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
from bilevel.problems.label_correction import Relabelled, SoftLabels
from bilevel.problems.learning_rates import LearningRate, Paced
from bilevel.problems.mixture import BalancedBatches, DomainWeights, Mixture, Sources
from bilevel.problems.pruning import (
    Mask,
    MaskedTraining,
    Pruning,
    ScoreMask,
    ThresholdMask,
    magnitude,
    mask_weights,
    prune,
    sparsity,
)
from bilevel.problems.reweighting import ExampleWeights, Reweighted
from bilevel.problems.search_space import Cell, DiscreteCell, MixedOperation, image_operations, tabular_operations
from bilevel.problems.supervised import Training, Validation, counterpart
from bilevel.problems.weight_network import LossWeighted, WeightNetwork

__all__ = [
    "Adaptation",
    "AdversarialTraining",
    "Analytic",
    "Architecture",
    "Assessment",
    "Augmentation",
    "BalancedBatches",
    "Ball",
    "Box",
    "Cell",
    "Constrained",
    "ConstrainedTraining",
    "Constraint",
    "Coreset",
    "CoresetTraining",
    "DiscreteCell",
    "Distillation",
    "DistilledTraining",
    "DomainWeights",
    "Episodes",
    "ExampleWeights",
    "Firm",
    "FunctionEpisodes",
    "Hyperparameter",
    "Hyperparameters",
    "Indexed",
    "LabelSmoothing",
    "LearningRate",
    "LossWeighted",
    "Mask",
    "MaskedTraining",
    "MetaLearner",
    "MixedOperation",
    "Mixture",
    "NestedQuadratic",
    "Noise",
    "Paced",
    "Perturbation",
    "Player",
    "Problem",
    "PrototypeMetaLearner",
    "Pruning",
    "Quadratic",
    "QuantityGame",
    "RandomBrightness",
    "RandomShift",
    "Relabelled",
    "Reweighted",
    "Ridge",
    "RobustValidation",
    "ScoreMask",
    "Simplex",
    "SoftLabels",
    "Sources",
    "SupernetTraining",
    "SyntheticSet",
    "TaskBatch",
    "TaskWeights",
    "Tasks",
    "ThresholdMask",
    "Training",
    "Tuned",
    "Validation",
    "Variable",
    "WeightDecay",
    "WeightNetwork",
    "attack",
    "counterpart",
    "discretise",
    "genotype",
    "image_operations",
    "magnitude",
    "mask_weights",
    "prune",
    "redraw",
    "sparsity",
    "split_classes",
    "tabular_operations",
    "with_spectrum",
]
