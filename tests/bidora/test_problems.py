"""BiDoRA's two problems against a hypergradient derived by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bidora import BiDoRAConfig, Direction, Magnitude, get_bidora_model
from bidora.orthogonality import orthogonality as penalty
from bilevel import Automatic, ConjugateGradient, Engine, EngineConfig, FiniteDifference, Identity
from bilevel.errors import DataError

SCALING = 2.0


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        return self.projection(x)


def squared_error(model, batch):
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(dim=1).mean()


def split(seed: int, size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator).double(), torch.randn(size, 4, generator=generator).double()


def adapted():
    torch.manual_seed(0)
    config = BiDoRAConfig(r=2, lora_alpha=2 * SCALING, target_modules=["projection"])
    model = get_bidora_model(Projection().double(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def parts(model) -> tuple[np.ndarray, ...]:
    layer = model.base_model.model.projection
    tensors = (
        layer.base_layer.weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    )
    return tuple(t.detach().numpy().copy() for t in tensors)


def gradients(w0, a, b, m, x, y):
    """By hand: with G = ∂L/∂W' = mean of (W'x − y) xᵀ and u = V/‖V‖ by rows,

    ∂L/∂m = u · G,   ∂L/∂V = (m/‖V‖) (I − uuᵀ) G,   ∂L/∂A = s Bᵀ ∂L/∂V,   ∂L/∂B = s ∂L/∂V Aᵀ.
    """
    v = w0 + SCALING * b @ a
    length = np.linalg.norm(v, axis=1, keepdims=True)
    u = v / length
    g = ((x @ (m[:, None] * u).T - y).T @ x) / len(x)
    dm = (u * g).sum(1)
    dv = m[:, None] / length * (g - dm[:, None] * u)
    return SCALING * b.T @ dv, SCALING * dv @ a.T, dm


def mixed(w0, a, b, m, x, y, va, vb):
    """Derivative of ∂L/∂m along (va, vb): δu = (I − uuᵀ) δV/‖V‖, δG = (m δu) C with C the mean of xxᵀ."""
    v = w0 + SCALING * b @ a
    length = np.linalg.norm(v, axis=1, keepdims=True)
    u = v / length
    g = ((x @ (m[:, None] * u).T - y).T @ x) / len(x)
    dv = SCALING * (vb @ a + b @ va)
    du = (dv - (u * dv).sum(1, keepdims=True) * u) / length
    dg = (m[:, None] * du) @ (x.T @ x / len(x))
    return (du * g).sum(1) + (u * dg).sum(1)


@pytest.mark.parametrize(("method", "rtol"), [(Identity(), 1e-12), (FiniteDifference(epsilon=1e-4), 1e-7)])
def test_one_step_is_the_one_derived_by_hand(method, rtol):
    model, train, validation = adapted(), split(2), split(3)
    w0, a, b, m = parts(model)
    (x, y), (xv, yv) = ([t.numpy() for t in part] for part in (train, validation))
    da, db, _ = gradients(w0, a, b, m, x, y)
    a, b = a - 0.1 * da, b - 0.1 * db
    va, vb, direct = gradients(w0, a, b, m, xv, yv)
    expected = direct - mixed(w0, a, b, m, x, y, va, vb)

    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    inner = Direction(model, optimizer=sgd, orthogonality=0.0, compute_loss=squared_error)
    outer = Magnitude(model, optimizer=sgd, compute_loss=squared_error)
    engine = Engine([outer, inner], EngineConfig(progress=False), hypergradient=method)
    engine.step({"direction": train, "magnitude": validation})
    _, found_a, found_b, found_m = parts(model)
    np.testing.assert_allclose(found_a, a, rtol=1e-12)
    np.testing.assert_allclose(found_b, b, rtol=1e-12)
    np.testing.assert_allclose(m - found_m, 0.1 * expected, rtol=rtol, atol=1e-12)
    # the implicit part is no rounding: leaving it out would be seen
    assert np.abs(expected - direct).max() > 1e-2 * np.abs(expected).max()


def test_who_owns_what_and_who_depends_on_whom():
    model = adapted()
    inner = Direction(model, compute_loss=squared_error, data=[split(2)])
    outer = Magnitude(model, compute_loss=squared_error, data=[split(3)])
    engine = Engine([outer, inner], EngineConfig(progress=False))
    assert [n.rsplit(".", 3)[1] for n in inner.parameter_names] == ["lora_A", "lora_B"]
    assert ["lora_magnitude_vector" in n for n in outer.parameter_names] == [True]
    assert engine.dependencies.inner == ("direction",)
    assert engine.dependencies.outer == ("magnitude",)
    assert not model.base_model.model.projection.base_layer.weight.requires_grad


def test_the_penalty_is_part_of_the_inner_loss_and_reported_apart():
    model = adapted()
    batch = split(2)
    plain = Direction(model, compute_loss=squared_error, orthogonality=0.0).loss(batch)["loss"]
    penalised = Direction(model, compute_loss=squared_error, orthogonality=0.5).loss(batch)
    torch.testing.assert_close(penalised["loss"], plain + 0.5 * penalised["orthogonality"])
    torch.testing.assert_close(penalised["task_loss"], plain.detach())
    assert penalised["orthogonality"] > 0


MIXED_ONLY = [Identity(), Identity(center="old"), FiniteDifference(), FiniteDifference(center="old"), Automatic()]


@pytest.mark.parametrize("method", [*MIXED_ONLY, ConjugateGradient(damping=1.0)], ids=str)
@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
def test_the_penalty_takes_part_in_products_only_where_it_matters(method, monkeypatch):
    # It does not depend on m: ∂²f/∂V∂m is the task's, while the Hessian holds it.
    class Plain(Direction):
        def respond(self, estimator, lower):
            return estimator.respond(lower)

    def run(kind):
        calls = []
        monkeypatch.setattr("bidora.problems.orthogonality_penalty", lambda model: calls.append(1) or penalty(model))
        model = adapted()
        sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
        inner = kind(model, optimizer=sgd, orthogonality=0.01, compute_loss=squared_error, name="direction")
        outer = Magnitude(model, optimizer=sgd, compute_loss=squared_error)
        engine = Engine([outer, inner], EngineConfig(progress=False), hypergradient=method)
        batches = {"direction": split(2), "magnitude": split(3)}
        engine.step(batches)
        del calls[:]
        assert "direction/orthogonality" in engine.step(batches).metrics
        return parts(model), len(calls)

    (found, calls), (expected, more) = run(Direction), run(Plain)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    mixed_only = method in MIXED_ONLY
    assert calls == (1 if mixed_only else more)  # the inner step's own
    assert more > 1 or method == Identity(center="old")


def test_the_head_belongs_to_the_direction(make_bert):
    model = get_bidora_model(make_bert(), BiDoRAConfig(task_type="SEQ_CLS", r=2))
    assert sum("modules_to_save" in name for name in Direction(model).parameter_names) == 2
    assert not any("modules_to_save" in name for name in Magnitude(model).parameter_names)


def test_a_batch_without_labels_says_so(make_bert, tokens):
    model = get_bidora_model(make_bert(), BiDoRAConfig(task_type="SEQ_CLS", r=2))
    with pytest.raises(DataError, match="needs 'labels', it has input_ids"):
        Direction(model).loss({"input_ids": tokens})


@pytest.mark.parametrize("method", ["finite_difference", "identity", "neumann", "conjugate_gradient", "unrolled"])
@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a transformer is not convex
def test_the_base_never_moves_whatever_the_method(method, make_bert, tokens):
    base = make_bert()
    before = copy.deepcopy(base.state_dict())
    model = get_bidora_model(base, BiDoRAConfig(task_type="SEQ_CLS", r=2))
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 1, 2])}
    adamw = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    problems = [Magnitude(model, optimizer=adamw, data=[batch]), Direction(model, optimizer=adamw, data=[batch])]
    engine = Engine(problems, EngineConfig(progress=False), hypergradient=method)
    for _ in range(3):
        engine.step()
    moved = {name for name, value in model.named_parameters() if value.requires_grad}
    frozen = {k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    checked = 0
    for name, value in before.items():
        if name in frozen and not name.startswith("classifier"):
            assert torch.equal(frozen[name], value), name
            checked += 1
    assert checked > 20
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
