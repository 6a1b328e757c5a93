"""Exact DoRA on convolutions and embeddings, against independent dense formulas in float64 and against plain PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bidora import (
    BiDoRAConfig,
    Direction,
    Magnitude,
    get_bidora_model,
    parameter_roles,
    use_exact_dora,
    weight_decomposition,
)
from bidora.dora import dora_linear
from bidora.layers import layer_matrices, layer_norm, layer_weight
from bidora.orthogonality import orthogonality
from bidora.variants import dora_convolution, dora_embedding, dora_layers, unsupported
from bilevel import Engine, EngineConfig, Identity
from bilevel.errors import ConfigError, ParameterError, UnknownNameError

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass
class Case:
    """One layer: its forward pass as ours and by definition, as functions of (x, A, B, m), and where to evaluate it."""

    ours: Forward
    definition: Forward
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    V: Tensor
    zero: Tensor

    @property
    def well_conditioned(self) -> bool:
        """Whether no row of V is small: tolerances are relative to ‖V‖."""
        return bool((self.V.norm(dim=1) > 0.1 * self.V.norm(dim=1).max())[~self.zero].all())


def normalised(V: Tensor, magnitude: Tensor) -> Tensor:
    """m ⊙ V/‖V‖ row by row; zero rows stay zero."""
    rows = [m * v / v.square().sum().sqrt() if v.any() else 0.0 * v for m, v in zip(magnitude, V, strict=True)]
    return torch.stack(rows)


def random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def convolutions(draw: st.DrawFn, *, zero_rows: bool = True) -> Case:
    dimensions = draw(st.integers(1, 3))
    rand = random(draw(st.integers(0, 10**6)))
    channels, out, rank = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dimensions))
    size = tuple(k + draw(st.integers(0, 2)) for k in kernel)
    stride = tuple(draw(st.integers(1, 2)) for _ in kernel)
    padding = draw(st.sampled_from([0, "same", "tuple"]))
    if padding == "same":  # of odd kernels: for others torch warns of a copy
        stride, kernel = (1,) * dimensions, tuple(k | 1 for k in kernel)
        size = tuple(max(*pair) for pair in zip(size, kernel, strict=True))
    settings: dict[str, Any] = {
        "stride": stride,
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel) if padding == "tuple" else padding,
    }
    zero = torch.tensor([zero_rows and draw(st.booleans()) for _ in range(out)])
    alive = (~zero).double()
    weight = rand(out, channels, *kernel) * alive.view(-1, 1, *(1 for _ in kernel))
    if dimensions == 2 and draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    A = rand(rank, channels, *kernel) / math.sqrt(channels * math.prod(kernel))
    B = draw(st.sampled_from([0.0, 0.5])) * rand(out, rank) * alive.unsqueeze(1)
    bias = rand(out) if draw(st.booleans()) else None
    batch = draw(st.sampled_from([(), (2,)]))
    scaling = draw(st.sampled_from([0.25, 2.0]))

    def ours(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return dora_convolution(x, weight, A, B, m, scaling, bias, **settings)

    def definition(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        V = weight.flatten(1) + scaling * B.flatten(1) @ A.flatten(1)
        return CONVOLUTIONS[dimensions](x, normalised(V, m.flatten()).view(weight.shape), bias, **settings)

    shapes = (out, rank, *(1 for _ in kernel)), (1, out, *(1 for _ in kernel))
    inputs = rand(*batch, channels, *size), A, B.view(shapes[0]), rand(*shapes[1])
    return Case(ours, definition, inputs, weight.flatten(1) + scaling * B @ A.flatten(1), zero)


@st.composite
def embeddings(draw: st.DrawFn, *, zero_rows: bool = True) -> Case:
    """x, a (tokens, tokens) matrix that mixes outputs, stands in for an input that derivatives are taken in."""
    rand = random(draw(st.integers(0, 10**6)))
    tokens, dim, rank = draw(st.integers(2, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    indices = torch.tensor(draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=6)))
    padding = draw(st.one_of(st.none(), st.integers(-tokens, tokens - 1)))
    zero = torch.tensor([zero_rows and draw(st.booleans()) for _ in range(dim)])
    alive = (~zero).double()
    weight = rand(tokens, dim) * alive
    A, B = rand(rank, tokens), draw(st.sampled_from([0.0, 0.5])) * rand(dim, rank) * alive.unsqueeze(1)
    scaling, embed_scale = draw(st.sampled_from([0.25, 2.0])), draw(st.sampled_from([1.0, 3.0]))

    def ours(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        found = dora_embedding(indices, weight, A, B, m, scaling, embed_scale=embed_scale, padding_idx=padding)
        return x @ found

    def definition(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        columns = list(A.T)
        if padding is not None:
            columns[padding] = columns[padding].detach()
        V = weight.T + scaling * B @ torch.stack(columns, dim=1)
        return x @ (embed_scale * normalised(V, m).T[indices])

    return Case(ours, definition, (rand(2, len(indices)), A, B, rand(dim)), weight.T + scaling * B @ A, zero)


def layers(**settings: bool) -> st.SearchStrategy[Case]:
    return st.one_of(convolutions(**settings), embeddings(**settings))


def derivatives(forward: Forward, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, its derivatives, and second ones: of the sum of squares of the first."""
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)
    y = forward(*leaves)
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [t.detach() for t in (y, *first, *second)]


@settings(max_examples=60)
@given(layers())
def test_output_and_two_derivatives_are_those_of_the_definition(case: Case) -> None:
    """With zero rows, whose output is the bias, and where those of the rows themselves are 0."""
    assume(case.well_conditioned and not bool(case.zero.all()))
    references = derivatives(case.definition, case.inputs)
    size = max(float(reference.abs().max()) for reference in references)
    for value, reference in zip(derivatives(case.ours, case.inputs), references, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-8, atol=1e-11 * size)


@settings(max_examples=8)
@given(layers(zero_rows=False))
def test_second_derivatives_are_those_of_finite_differences(case: Case) -> None:
    assume(case.well_conditioned)
    # the padding column is a constant of ours, which a difference would move
    leaves = tuple(t.clone().requires_grad_(i != 1) for i, t in enumerate(case.inputs))
    assert torch.autograd.gradcheck(case.ours, leaves, rtol=1e-3, atol=1e-4)
    assert torch.autograd.gradgradcheck(case.ours, leaves, rtol=1e-3, atol=1e-4)


@settings(max_examples=25)
@given(layers())
def test_vmap_over_adapters_is_a_loop_over_them(case: Case) -> None:
    assume(case.well_conditioned)
    x, A, B, m = case.inputs
    stacked = torch.stack([A, 2 * A]), torch.stack([B, B]), torch.stack([m, -m])
    looped = [case.ours(x, *(t[i] for t in stacked)) for i in range(2)]
    together = torch.vmap(lambda *adapter: case.ours(x, *adapter))(*stacked)
    torch.testing.assert_close(together, torch.stack(looped), rtol=1e-9, atol=1e-10)

    def gradient(A: Tensor, B: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *adapter: case.ours(x, *adapter).sin().sum(), argnums=(0, 1, 2))(A, B, m)

    looped = [gradient(*(t[i] for t in stacked)) for i in range(2)]
    for value, *each in zip(torch.vmap(gradient)(*stacked), *looped, strict=True):
        torch.testing.assert_close(value, torch.stack(each), rtol=1e-8, atol=1e-9 * float(value.abs().max() + 1))


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_convolution_of_points_is_a_linear_layer(seed: int, rank: int) -> None:
    rand = random(seed)
    x, weight, A, B, m = rand(2, 3, 4, 5), rand(6, 3), rand(rank, 3), rand(6, rank), rand(6)
    expected = dora_linear(x.movedim(1, -1), weight, A, B, m, 0.5, bias := rand(6)).movedim(-1, 1)
    points = [t[..., None, None] for t in (weight, A, B)]
    found = dora_convolution(x, *points, m.view(1, -1, 1, 1), 0.5, bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# Models


class Net(nn.Module):
    """Tokens in, classes out, through every kind of layer."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.conv1 = nn.Conv1d(6, 8, 3, padding="same")
        self.conv2 = nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(1, 0))
        self.conv3 = nn.Conv3d(1, 4, (2, 1, 2), bias=False)
        self.linear = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv1(self.embedding(tokens).movedim(-1, 1)).tanh()  # (batch, 8, 6)
        x = self.conv2(x.unflatten(1, (2, 4))).tanh()  # (batch, 5, 4, 3)
        x = self.conv3(x.unsqueeze(1)).tanh()
        return self.linear(x.flatten(2).mean(2))


KINDS = ("embedding", "conv1", "conv2", "conv3")
TOKENS = torch.randint(0, 11, (5, 6), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def config(*targets: str, **fields: Any) -> BiDoRAConfig:
    return BiDoRAConfig(target_modules=list(targets or KINDS), **{"r": 3, "lora_alpha": 6, **fields})


def perturb(model: nn.Module, size: float = 0.2) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def trained(dtype: torch.dtype = torch.float64, base: nn.Module | None = None, **fields: Any) -> PeftModel:
    adapted: PeftModel = perturb(get_bidora_model((base or Net()).to(dtype), config(**fields)))
    return adapted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.5, False), (0.5, True)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_outputs_equal_pefts(kind: str, dropout: float, training: bool, dtype: torch.dtype, tolerance: float) -> None:
    # with dropout PEFT convolves an input in the dtype of A with a weight in the dtype of the base: they have to agree
    model = get_peft_model(Net().to(dtype), config(kind, lora_dropout=dropout), autocast_adapter_dtype=not dropout)
    perturb(model).train(training)
    torch.manual_seed(5)
    expected = model(TOKENS)
    use_exact_dora(model)
    torch.manual_seed(5)
    found = model(TOKENS)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_adapted_model_starts_as_the_base_model_bit_for_bit(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    with torch.no_grad():
        model.conv2.weight[1] = 0
        model.embedding.weight[:, 2] = 0
    expected = model(TOKENS)
    assert torch.equal(get_bidora_model(model, config())(TOKENS), expected)


def test_under_autocast_and_without_a_batch() -> None:
    model = trained(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(TOKENS)
        loss = F.cross_entropy(low, LABELS)
    torch.testing.assert_close(low.float(), model(TOKENS), rtol=5e-2, atol=5e-2)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    full = torch.autograd.grad(
        F.cross_entropy(model(TOKENS), LABELS), [p for p in model.parameters() if p.requires_grad]
    )
    assert F.cosine_similarity(*(torch.cat([g.flatten() for g in part]) for part in (gradients, full)), dim=0) > 0.99
    layer = model.base_model.model.conv2
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0)).squeeze(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_outputs_and_gradients_on_a_gpu_are_those_on_the_cpu() -> None:
    def evaluated(device: str) -> list[Tensor]:
        model = trained(base=Net(padding_idx=3)).to(device)
        loss = F.cross_entropy(model(TOKENS.to(device)), LABELS.to(device))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, parameters))]

    for value, reference in zip(evaluated("cuda"), evaluated("cpu"), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["embedding", "conv2"])
def test_a_layer_compiles_without_a_break(kind: str) -> None:
    model = trained(torch.float32)
    layer = getattr(model.base_model.model, kind)
    x = TOKENS if kind == "embedding" else torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(x), compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    for value, reference in zip(
        torch.autograd.grad(found.sin().sum(), parameters),
        torch.autograd.grad(expected.sin().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS), LABELS)


def asymmetry(model: nn.Module, padding_idx: int | None) -> float:
    """|⟨u, Jv⟩ − ⟨v, Ju⟩| of the Jacobian J of the gradient in A and B, relative; J by central differences."""
    parameters = [p for name, p in model.named_parameters() if "_A." in name or "_B." in name]
    rand = random(3)
    u, v = ([rand(*p.shape) for p in parameters] for _ in range(2))
    if padding_idx is not None:  # a constant, and no variable of the gradient
        for direction in (u, v):
            direction[0][:, padding_idx] = 0

    def moved(direction: list[Tensor], step: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
        return torch.autograd.grad(loss_of(model), parameters)

    def product(a: list[Tensor], b: list[Tensor]) -> float:
        up, down = moved(b, 1e-5), moved(b, -2e-5)
        moved(b, 1e-5)
        return float(sum((s * (p - q)).sum() for s, p, q in zip(a, up, down, strict=True))) / 2e-5

    uv, vu = product(u, v), product(v, u)
    return abs(uv - vu) / max(abs(uv), abs(vu))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_the_gradients_jacobian_is_symmetric_as_pefts_is_not(padding_idx: int | None) -> None:
    model = perturb(get_peft_model(Net(padding_idx).double(), config()))
    assert asymmetry(model, padding_idx) > 1e-3
    assert asymmetry(use_exact_dora(model), padding_idx) < 1e-6


def test_a_padding_tokens_column_is_not_trained() -> None:
    """W₀'s row of it is not zero here, so that the norm alone would move it."""
    model = trained(base=Net(padding_idx=3))
    layer = model.base_model.model.embedding
    assert bool((TOKENS == 3).any())
    loss_of(model).backward()
    gradient = layer.lora_embedding_A["default"].grad
    assert not gradient[:, 3].any()
    assert bool((gradient[:, [0, 1, 2, 4]] != 0).all())


@pytest.mark.parametrize("kind", ["embedding", "conv1", "conv2"])
def test_zero_filters_and_dimensions_are_no_nan_here_and_none_in_plain_peft(kind: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = Net()
        with torch.no_grad():
            if kind == "embedding":
                model.embedding.weight[:, 1:3] = 0
            else:
                getattr(model, kind).weight[1] = 0
        return model

    expected = base()(TOKENS)
    adapted = get_bidora_model(base(), config(kind))
    torch.testing.assert_close(adapted(TOKENS), expected)
    adapted.save_pretrained(str(tmp_path / "start"))
    torch.testing.assert_close(PeftModel.from_pretrained(base(), str(tmp_path / "start"))(TOKENS), expected)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        gradients = torch.autograd.grad(loss_of(adapted), parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)
        assert all(bool(t.isfinite().all()) for t in (*gradients, *second))
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.detach()
        optimizer.step()
    adapted.save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(base(), str(tmp_path))
    found = plain(TOKENS)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, adapted(TOKENS), rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_a_plain_adapter(tmp_path: Path) -> None:
    adapted = trained(torch.float32)
    adapted.save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(Net(), str(tmp_path))
    assert not list(dora_layers(plain))
    torch.testing.assert_close(plain(TOKENS), adapted(TOKENS), rtol=1e-5, atol=1e-6)
    again = use_exact_dora(PeftModel.from_pretrained(Net(), str(tmp_path), is_trainable=True))
    assert torch.equal(again(TOKENS), adapted(TOKENS))
    assert parameter_roles(again) == parameter_roles(adapted)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_keeps_the_outputs_and_unmerging_restores_rows_that_became_zero(safe: bool) -> None:
    model = Net()
    with torch.no_grad():
        model.conv1.weight[2] = 0
        model.embedding.weight[:, 4] = 0
    adapted = trained(base=model)
    with torch.no_grad():
        for name, layer, adapter in dora_layers(adapted):
            layer.lora_magnitude_vector[adapter].weight.flatten()[1] = 0
            if "embedding" in name:
                layer.lora_embedding_B[adapter][4] = 0
            elif "conv1" in name:
                layer.lora_B[adapter].weight[2] = 0
    weights = {name: layer.base_layer.weight.detach().clone() for name, layer, _ in dora_layers(adapted)}
    expected = adapted(TOKENS).detach()  # a graph would keep the base weights, and unmerging take them from there
    assert bool(expected.isfinite().all())
    adapted.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(adapted(TOKENS), expected, rtol=1e-9, atol=1e-11)
    adapted.unmerge_adapter()
    for name, layer, _ in dora_layers(adapted):
        torch.testing.assert_close(layer.base_layer.weight.detach(), weights[name], rtol=1e-9, atol=1e-11)
    merged = adapted.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-9, atol=1e-11)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_merging_an_embedding_leaves_a_tied_output_layer_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens).tanh())

    model = Tied()
    tokens = torch.arange(7)
    adapted = perturb(get_bidora_model(model, config("embedding")))
    expected, weight = adapted(tokens), model.head.weight.detach().clone()
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(tokens), expected)
    assert torch.equal(model.head.weight, weight)
    adapted.unmerge_adapter()
    assert model.embedding.base_layer.weight is model.head.weight
    assert torch.equal(adapted(tokens), expected)


def test_roles_norms_and_effective_weights() -> None:
    adapted = trained()
    roles = parameter_roles(adapted)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {*roles.direction, *roles.magnitude} == trainable
    assert len(roles.direction) == 2 * len(roles.magnitude) == 2 * len(KINDS)
    for name, layer, adapter in dora_layers(adapted):
        weight, (A, B, m), scaling = layer_matrices(layer, adapter)
        norm = (weight + scaling * B @ A).norm(dim=1)
        torch.testing.assert_close(layer_norm(layer, adapter), norm)
        torch.testing.assert_close(layer_weight(layer, adapter).norm(dim=1), m.abs())
        merged = copy.deepcopy(layer)
        merged.merge()
        stored = merged.base_layer.weight.detach()
        dense = stored.T if "embedding" in name else stored.flatten(1)
        torch.testing.assert_close(layer_weight(layer, adapter), dense)


def test_the_penalty_is_that_of_the_filters_and_dimensions() -> None:
    adapted = trained()
    penalties = []
    for _, layer, adapter in dora_layers(adapted):
        D = F.normalize(layer_weight(layer, adapter) * layer_matrices(layer, adapter)[1][2].sign().unsqueeze(1))
        penalties.append((D @ D.T - torch.eye(len(D), dtype=D.dtype)).square().sum())
    assert len(penalties) == len(KINDS)
    torch.testing.assert_close(orthogonality(adapted), torch.stack(penalties).mean())


def test_the_decomposition_sees_magnitude_and_direction_of_every_kind() -> None:
    base = Net().double()
    adapted = get_bidora_model(copy.deepcopy(base), config())
    start = weight_decomposition(base, adapted)
    assert [layer.name for layer in start.layers] == list(KINDS)
    assert all(layer.magnitude < 1e-12 and layer.direction < 1e-12 for layer in start.layers)
    with torch.no_grad():
        for _, layer, adapter in dora_layers(adapted):
            layer.lora_magnitude_vector[adapter].weight.add_(0.5)
    moved = weight_decomposition(base, adapted)
    assert all(layer.magnitude == pytest.approx(0.5) and layer.direction < 1e-12 for layer in moved.layers)
    perturb(adapted)
    full = weight_decomposition(base, adapted)
    assert all(layer.direction > 1e-3 for layer in full.layers)
    assert weight_decomposition(base.state_dict(), adapted) == full
    merged = copy.deepcopy(adapted).merge_and_unload()
    by_name = {layer.name: layer for layer in weight_decomposition(base, merged).layers}
    assert set(by_name) == {"conv1", "conv2", "conv3", "linear"}, "tokens' rows are no rows of an embedding's"
    for layer in full.layers[1:]:
        assert by_name[layer.name].direction == pytest.approx(layer.direction, rel=1e-9)


def test_a_plain_lora_convolution_is_compared_too() -> None:
    adapted = perturb(get_peft_model(Net().double(), LoraConfig(r=2, target_modules=["conv2", "embedding"])))
    change = weight_decomposition(Net().double(), adapted)
    assert [layer.name for layer in change.layers] == ["embedding", "conv2"]
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = next(x for x in weight_decomposition(Net().double(), merged).layers if x.name == "conv2")
    assert change.layers[1].direction == pytest.approx(expected.direction, rel=1e-9)
    with pytest.warns(UserWarning, match="groups"):
        grouped = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ParameterError, match="0, a convolution of several groups, is not known"):
        weight_decomposition(grouped, grouped)


def test_no_copy_of_a_channels_last_weight_is_kept_for_backward() -> None:
    weight = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last)
    A, B = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(16, 2, 1, 1, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(1, 8, 3, 3)
        dora_convolution(x, weight, A, B, torch.ones(1, 16, 1, 1), 1.0, base_result=F.conv2d(x, weight))
    assert any(t.data_ptr() == weight.data_ptr() for t in kept)
    assert all(t.numel() < weight.numel() or t.data_ptr() == weight.data_ptr() for t in kept)


# What is refused, and why


class Standardised(nn.Conv2d):
    """Convolves with another matrix than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv1d(4, 4, 3, dilation=2), r"dilation=\(2,\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (Standardised(4, 4, 3), "Standardised has a forward pass of its own, not nn.Conv2d's"),
        (nn.ConvTranspose2d(4, 4, 3), "is a ConvTranspose2d"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
)
def test_layers_without_an_exact_forward_are_refused_with_the_reason(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(layer)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f"0 cannot be adapted: .*{message}"):
        get_bidora_model(model, config("0", r=2))
    assert list(model.state_dict()) == list(before)
    assert unsupported(nn.Conv2d(4, 4, 3)) is None


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_pefts_norm_with_groups_is_not_that_of_its_weight() -> None:
    """The reason why groups are refused: the norm that a loaded adapter would divide by is not the filters'."""
    layer = perturb(get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 1, groups=2)), config("0", r=2))).base_model.model[0]
    A, B, W = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    V = torch.zeros(6, 4)
    for j in range(6):
        group = j // 3
        V[j, 2 * group : 2 * group + 2] += W[j].flatten()
        V[j] += layer.scaling["default"] * B[j].flatten() @ A[group : group + 1].flatten(1)
    dora = layer.lora_magnitude_vector["default"]
    delta = dora.get_lora_weight(layer.lora_A["default"], layer.lora_B["default"]).reshape(W.shape)
    norm = dora.get_weight_norm(W, delta, layer.scaling["default"]).flatten()
    assert not torch.allclose(norm, V.norm(dim=1), rtol=1e-2)
    # while the layer's change of the output is that of V
    x = torch.randn(1, 4, 1, 1)
    change = layer.lora_B["default"](layer.lora_A["default"](x)).flatten() * layer.scaling["default"]
    torch.testing.assert_close(F.conv2d(x, W, groups=2).flatten() + change, V @ x.flatten())


def test_how_linear_layers_are_computed_is_chosen_for_the_model() -> None:
    model = perturb(get_peft_model(Net(), config("conv2", "linear")))
    expected = model(TOKENS)
    linear = model.base_model.model.linear
    with pytest.raises(UnknownNameError, match="unknown kernels 'triton'. Choices: 'auto', 'fused', 'torch'"):
        use_exact_dora(model, kernels="triton")
    assert not list(dora_layers(model))
    use_exact_dora(model, kernels="torch")
    assert linear.lora_variant["default"].kernels == "torch"
    assert not linear.cast_input_dtype_enabled
    torch.testing.assert_close(model(TOKENS), expected)
    linear.update_layer("plain", r=2, lora_alpha=2, config=LoraConfig(r=2))
    assert use_exact_dora(model).base_model.model.linear.cast_input_dtype_enabled


# Training


def test_one_step_of_the_search_is_that_of_the_dense_definition() -> None:
    """Direction and magnitude of a net with every kind of layer, against plain autograd through dense weights."""
    adapted = trained()
    names = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    roles = parameter_roles(adapted)
    bases = {name: layer.base_layer.weight.detach().clone() for name, layer, _ in dora_layers(adapted)}
    rand = torch.Generator().manual_seed(7)
    train, validation = (
        (torch.randint(0, 11, (4, 6), generator=rand), torch.randint(0, 3, (4,), generator=rand)) for _ in range(2)
    )

    def loss(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        model, dense = Net().double(), {}
        for name, weight in bases.items():
            own = {key.removeprefix(f"{name}."): p for key, p in parameters.items() if key.startswith(f"{name}.")}
            A, B, m = own.values()
            embedding = "embedding" in name
            rows = (weight.T if embedding else weight.flatten(1)) + 2.0 * B.flatten(1) @ A.flatten(1)
            W = m.flatten().unsqueeze(1) * rows / rows.norm(dim=1, keepdim=True)
            dense[f"{name.removeprefix('base_model.model.')}.weight"] = W.T if embedding else W.view(weight.shape)
        return F.cross_entropy(torch.func.functional_call(model, dense, (batch[0],)), batch[1])

    def gradient(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor], keys: tuple[str, ...]) -> list[Tensor]:
        return list(torch.autograd.grad(loss(parameters, batch), [parameters[k] for k in keys], create_graph=True))

    leaves = {name: names[name].clone().requires_grad_() for name in sorted(names, key=list(names).index)}
    step = dict(zip(roles.direction, gradient(leaves, train, roles.direction), strict=True))
    after = {k: (p.detach() - 0.1 * step[k].detach() if k in step else p.detach()) for k, p in leaves.items()}
    after = {k: p.requires_grad_() for k, p in after.items()}
    v = [g.detach() for g in gradient(after, validation, roles.direction)]
    direct = [g.detach() for g in gradient(after, validation, roles.magnitude)]
    inner = gradient(after, train, roles.direction)
    mixed = torch.autograd.grad(inner, [after[k] for k in roles.magnitude], v)

    def compute(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    direction = Direction(adapted, optimizer=sgd, orthogonality=0.0, compute_loss=compute)
    magnitude = Magnitude(adapted, optimizer=sgd, compute_loss=compute)
    engine = Engine([magnitude, direction], EngineConfig(progress=False), hypergradient=Identity())
    engine.step({"direction": train, "magnitude": validation})
    found = dict(adapted.named_parameters())
    for key in roles.direction:
        torch.testing.assert_close(found[key].detach(), after[key].detach(), rtol=1e-9, atol=1e-12)
    for key, d, c in zip(roles.magnitude, direct, mixed, strict=True):
        expected = names[key] - 0.1 * (d - c)
        torch.testing.assert_close(found[key].detach(), expected, rtol=1e-8, atol=1e-11)
        assert float(c.abs().max()) > 1e-4 * float(d.abs().max()), "the implicit part is no rounding"
