"""Tiny models made from configurations: nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

VOCABULARY = 40


@pytest.fixture(autouse=True)
def known_warnings() -> Iterator[None]:
    """PEFT reads an attribute that transformers is about to rename."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


@pytest.fixture(scope="session")
def make_bert() -> Callable[..., nn.Module]:
    """A BERT-like classifier with as many labels as asked for."""

    def make(seed: int = 0, num_labels: int = 3, **settings: object) -> nn.Module:
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=16,
            num_labels=num_labels,
            attn_implementation="eager",
            **settings,
        )
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()

    return make


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., nn.Module]:
    """A Llama-like model with a sequence-classification head and non-square key and value layers."""

    def make(seed: int = 0, num_labels: int = 2, **settings: object) -> nn.Module:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=20,
            max_position_embeddings=16,
            num_labels=num_labels,
            pad_token_id=0,
            attn_implementation="eager",
            **settings,
        )
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config).eval()

    return make


@pytest.fixture(scope="session")
def make_gpt2() -> Callable[..., nn.Module]:
    """A GPT-2-like classifier, whose linear layers are transformers' Conv1D."""

    def make(seed: int = 0, num_labels: int = 2, **settings: object) -> nn.Module:
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=12,
            n_layer=2,
            n_head=2,
            n_positions=16,
            num_labels=num_labels,
            pad_token_id=0,
            attn_implementation="eager",
            **settings,
        )
        torch.manual_seed(seed)
        return GPT2ForSequenceClassification(config).eval()

    return make


@pytest.fixture(scope="session")
def make_model(
    make_bert: Callable[..., nn.Module], make_llama: Callable[..., nn.Module], make_gpt2: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    """Any of the three, by name."""
    makers = {"bert": make_bert, "llama": make_llama, "gpt2": make_gpt2}
    return lambda kind, *args, **settings: makers[kind](*args, **settings)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """A batch of token ids, (3, 7), without padding."""
    return torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
