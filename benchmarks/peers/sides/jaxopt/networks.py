"""The workloads' networks in jax, at parameters by their names in torch.

Images have their channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.workloads.unrolled import HEADS, LAYERS, VOCABULARY

Named = Mapping[str, Any]
EPSILON = 1e-5  # of torch's layer and batch normalisation


def conv_net(p: Named, x: Any) -> Any:
    """Of the unrolled steps: ``x`` is (batch, height, width, channels)."""
    for i, stride in enumerate((1, 2, 2)):
        x = jax.nn.relu(convolution(p, f"layers.{i}", x, stride))
    return linear(p, "head", x.mean((1, 2)))


def few_shot_net(p: Named, x: Any) -> Any:
    """Four blocks, normalised over the batch where there are weights for it."""
    for i in range(4):
        x = convolution(p, f"convolutions.{i}", x)
        if f"norms.{i}.weight" in p:
            x = normalised(p, f"norms.{i}", x, (0, 1, 2))
        x = pooled(jax.nn.relu(x))
    return linear(p, "head", x.reshape(len(x), -1))


def sinusoid_net(p: Named, x: Any) -> Any:
    """Two hidden layers."""
    return linear(p, "4", jax.nn.relu(linear(p, "2", jax.nn.relu(linear(p, "0", x)))))


def transformer(p: Named, tokens: Any, activation: Callable[[Any], Any] = jax.nn.relu) -> Any:
    """Returns logits of (batch · length, vocabulary); tokens by a product, whose derivative has no scatter."""
    x = jax.nn.one_hot(tokens, VOCABULARY, dtype=p["token.weight"].dtype) @ p["token.weight"] + p["place.weight"]
    for i in range(LAYERS):
        x = x + attention(p, f"layers.{i}", normalised(p, f"layers.{i}.norms.0", x, -1))
        hidden = activation(linear(p, f"layers.{i}.up", normalised(p, f"layers.{i}.norms.1", x, -1)))
        x = x + linear(p, f"layers.{i}.down", hidden)
    return linear(p, "head", x).reshape(-1, VOCABULARY)


def attention(p: Named, name: str, x: Any) -> Any:
    batch, length, width = x.shape
    query, key, value = jnp.moveaxis(linear(p, f"{name}.read", x).reshape(batch, length, 3, HEADS, -1), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // HEADS) ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf))
    found = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
    return linear(p, f"{name}.write", found)


def linear(p: Named, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def convolution(p: Named, name: str, x: Any, stride: int = 1) -> Any:
    """3 × 3, padded by one: nine shifted copies of the images and one product.

    With ``jax.lax.conv_general_dilated`` the unrolled steps take 1.4 times as long on a processor, and 6 to 8 times in
    the body of a ``lax.scan``, which is how JAXopt unrolls (jax 0.10.2, 5 steps).
    """
    weight, (_, height, width, _) = p[f"{name}.weight"], x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3)]
    shifted = [padded[:, i : i + height : stride, j : j + width : stride] for i, j in places]
    product = jnp.concatenate(shifted, axis=-1) @ weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
    return product + p[f"{name}.bias"]


def normalised(p: Named, name: str, x: Any, axes: Any) -> Any:
    """Layer normalisation over the last axis, or batch normalisation over all others."""
    away = x - x.mean(axes, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(away).mean(axes, keepdims=True) + EPSILON)
    return away * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def pooled(x: Any) -> Any:
    """The largest of each 2 × 2, without what is left over at the end."""
    count, height, width, channels = x.shape
    height, width = height // 2, width // 2
    return x[:, : 2 * height, : 2 * width].reshape(count, height, 2, width, 2, channels).max((2, 4))
