"""What cannot be differentiated twice is found in the graph of a loss, before the first product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bilevel import Engine, EngineConfig, Problem
from bilevel.double_backward import obstacles, refuse_obstacles
from bilevel.errors import LossError

ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


def attend(z: Tensor) -> Tensor:
    q = z.reshape(1, 1, *z.shape)
    return F.scaled_dot_product_attention(q, q, q).square().sum()


def targets() -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2])


REFUSED = {
    "ScaledDotProductFlashAttentionForCpuBackward0": (attend, "SDPBackend.MATH"),
    "CtcLossBackward0": (lambda z: F.ctc_loss(z.log_softmax(-1)[:, None], *targets()), "nothing is differentiated"),
    "CdistBackward0": (lambda z: torch.cdist(z, z.detach() + 1).sum(), "elementary operations"),
    "PdistBackward0": (lambda z: F.pdist(z).sum(), "elementary operations"),
    "HardsigmoidBackward0": (lambda z: F.hardsigmoid(z).square().sum(), "relu6"),
    "MultiMarginLossBackward0": (lambda z: F.multi_margin_loss(z, torch.arange(8) % 5), "relu"),
    "MultilabelMarginLossBackward0": (
        lambda z: F.multilabel_margin_loss(z, torch.zeros(8, 5, dtype=torch.long)).square(),
        "relu",
    ),
    "SegmentReduceBackward0": (
        lambda z: torch.segment_reduce(z[:, 0], "sum", lengths=torch.tensor([4, 4])).square().sum(),
        "scatter_reduce",
    ),
    "EmbeddingBagBackward0": (
        lambda z: F.embedding_bag(torch.tensor([[1, 2, 2]]), z).square().sum(),
        "nn.Embedding and sum",
    ),
    "CompiledFunctionBackward": (
        lambda z: torch.compile(lambda z: z.square().sum(), backend="aot_eager")(z),
        "before torch.compile",
    ),
    "OnceBackward": (lambda z: Once.apply(z).sum(), "drop the mark"),
}


# Loading the compiler takes seconds; test_compiled.py covers it in the fast tests.
MARKS = {"CompiledFunctionBackward": [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]}


@pytest.mark.parametrize(
    ("node", "loss", "remedy"),
    [pytest.param(key, *row, id=key, marks=MARKS.get(key, [])) for key, row in REFUSED.items()],
)
def test_an_operation_without_second_derivative_is_refused_with_its_remedy(node, loss, remedy):
    w = nn.Parameter(torch.eye(5))
    value = loss(ROWS @ w)
    assert [found.node for found in obstacles(value, [w])] == [node]
    with pytest.raises(LossError) as caught:
        refuse_obstacles(value, (w,), "problem 'inner'")
    message = str(caught.value)
    assert message.startswith("the loss of problem 'inner' cannot be differentiated twice: ")
    for part in (node, remedy, "products='finite_difference'", "method 'finite_difference'"):
        assert part in message
    if node != "OnceBackward":  # the table tells the truth: torch itself fails at the second derivative
        (grad,) = torch.autograd.grad(value, w, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.square().sum(), w)


class Rates(Problem):
    def loss(self, batch):
        return self.attention(batch).mean()


class Attention(Problem):
    def loss(self, batch):
        z = self(batch).reshape(1, 1, *batch.shape)
        penalty = self.rates.module[0].exp() * self.module.weight.square().sum()
        return F.scaled_dot_product_attention(z, z, z).square().mean() + penalty


def attending(method) -> Engine:
    torch.manual_seed(0)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    outer = Rates(nn.ParameterList([torch.tensor(0.0)]), optimizer=sgd, data=[ROWS])
    inner = Attention(nn.Linear(5, 5, bias=False), optimizer=sgd, data=[ROWS], steps=2)
    return Engine([outer, inner], EngineConfig(progress=False), method)


@pytest.mark.parametrize("method", ["identity", "neumann", "stocbio", "unrolled"])
def test_an_engine_refuses_attention_before_its_first_step(method):
    with pytest.raises(LossError, match=r"problem 'attention'.*fused attention.*'finite_difference'.*SDPBackend\.MATH"):
        attending(method)
    with sdpa_kernel(SDPBackend.MATH):
        attending(method)


@pytest.mark.parametrize(
    "method",
    [
        "finite_difference",
        {"method": "neumann", "products": "finite_difference"},
        {"method": "stocbio", "products": "finite_difference"},
    ],
    ids=str,
)
def test_an_engine_runs_attention_by_first_derivatives(method):
    """What the refusal says is true, and gives what the math back end gives."""
    ends = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            made = attending(method)
            torch.manual_seed(0)
            made.step()
            ends.append(made.problems["rates"].module[0].item())
    assert ends[0] != 0
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)


def test_an_operation_off_the_way_to_the_parameters_is_no_obstacle():
    w, other = nn.Parameter(torch.eye(5)), nn.Parameter(torch.eye(5))
    value = attend(ROWS @ other) + (ROWS @ w).square().sum()
    assert obstacles(value, [w]) == []
    refuse_obstacles(value, (w,), "problem 'inner'")
    assert len(obstacles(value, [w, other])) == 1


def test_a_constant_gradient_is_let_through():
    """The second derivative of an embedding bag under a linear loss is zero, and torch can say so."""
    w = nn.Parameter(torch.ones(5, 4))
    value = F.embedding_bag(torch.tensor([[1, 2, 2]]), w).sum()
    assert len(obstacles(value, [w])) == 1
    refuse_obstacles(value, (w,), "problem 'inner'")


def test_the_graph_is_kept():
    w = nn.Parameter(torch.ones(5, 4))
    value = F.embedding_bag(torch.tensor([[1, 2, 2]]), w).sum()
    refuse_obstacles(value, (w,), "problem 'inner'")
    torch.autograd.grad(value, w)


def test_an_obstacle_is_found_within_a_checkpointed_segment():
    w = nn.Parameter(torch.eye(5))
    value = checkpoint(attend, ROWS @ w, use_reentrant=False)
    with pytest.raises(LossError, match=r"SDPBackend\.MATH"):
        refuse_obstacles(value, (w,), "problem 'inner'")


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, torch.arange(8) % 5),
        lambda z: F.gelu(F.layer_norm(z, (5,))).square().sum(),
        lambda z: torch.linalg.eigvalsh(z.T @ z).square().sum(),
        lambda z: F.hardswish(z).square().sum(),
    ],
)
def test_ordinary_losses_have_no_obstacle(loss):
    w = nn.Parameter(torch.eye(5))
    assert obstacles(loss(ROWS @ w), [w]) == []


def test_the_math_back_end_is_the_remedy_it_is_said_to_be():
    w = nn.Parameter(torch.eye(5))
    with sdpa_kernel(SDPBackend.MATH):
        value = attend(ROWS @ w)
    assert obstacles(value, [w]) == []
    (grad,) = torch.autograd.grad(value, w, create_graph=True)
    torch.autograd.grad(grad.square().sum(), w)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_a_second_derivative_on_the_cpu(kind):
    """No obstacle, and rightly: the Hessian's products are those of differences."""
    torch.manual_seed(0)
    layer = kind(3, 3).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    params = list(layer.parameters())
    direction = [torch.randn_like(p) for p in params]

    def gradient(create_graph: bool = False) -> tuple[Tensor, ...]:
        value = layer(x)[0].square().sum()
        assert obstacles(value, params) == []
        return torch.autograd.grad(value, params, create_graph=create_graph)

    found = torch.autograd.grad(gradient(create_graph=True), params, direction)
    with torch.no_grad():
        for p, part in zip(params, direction, strict=True):
            p.add_(part, alpha=1e-5)
        ahead = gradient_of(gradient)
        for p, part in zip(params, direction, strict=True):
            p.sub_(part, alpha=2e-5)
        behind = gradient_of(gradient)
    for product, a, b in zip(found, ahead, behind, strict=True):
        torch.testing.assert_close(product, (a - b) / 2e-5, rtol=1e-6, atol=1e-7)


def gradient_of(function) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return function()


CUDA_ATTENTION = {
    "ScaledDotProductFlashAttentionBackward0": (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
    "ScaledDotProductEfficientAttentionBackward0": (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    "ScaledDotProductCudnnAttentionBackward0": (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("node", CUDA_ATTENTION)
def test_fused_attention_on_the_gpu_is_refused(node):
    backend, dtype = CUDA_ATTENTION[node]
    w = nn.Parameter(torch.eye(64, device="cuda", dtype=dtype))
    x = torch.randn(2, 4, 32, 64, device="cuda", dtype=dtype)
    with sdpa_kernel(backend):
        value = F.scaled_dot_product_attention(x @ w, x @ w, x @ w).float().square().sum()
    assert [found.node for found in obstacles(value, [w])] == [node]
    with pytest.raises(LossError, match=r"SDPBackend\.MATH"):
        refuse_obstacles(value, (w,), "problem 'inner'")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_cudnn_rnns_are_refused_and_have_the_remedy(kind):
    layer = kind(3, 3).cuda()
    params = tuple(layer.parameters())
    x = torch.randn(4, 2, 3, device="cuda")
    value = layer(x)[0].square().sum()
    assert [found.node for found in obstacles(value, params)] == ["CudnnRnnBackward0"]
    with pytest.raises(LossError, match=r"cudnn\.flags"):
        refuse_obstacles(value, params, "problem 'inner'")
    with torch.backends.cudnn.flags(enabled=False):
        value = layer(x)[0].square().sum()
        refuse_obstacles(value, params, "problem 'inner'")
        grads = torch.autograd.grad(value, params, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), params)
