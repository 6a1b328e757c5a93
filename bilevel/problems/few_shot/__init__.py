"""Few-shot learning: parameters from which new tasks are learned in a few steps, all tasks of a batch at once."""

from bilevel.problems.few_shot.assessment import Assessment
from bilevel.problems.few_shot.learning import Adaptation, MetaLearner
from bilevel.problems.few_shot.prototypes import PrototypeMetaLearner

__all__ = ["Adaptation", "Assessment", "MetaLearner", "PrototypeMetaLearner"]
