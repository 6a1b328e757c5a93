"""Second-order products of an inner loss as compiled graphs, and the iterations of a solver with them.

``torch.compile`` has no second derivatives of what it compiles. So it only *captures* the loss here, as one graph of
tensors in and tensors out: parameters, batch, buffers and every other tensor that the loss reads are inputs of it, what
is no tensor is guarded, and a change makes a new capture. The derivatives are taken of the captured graph by autograd
while that is traced once more, down to elementary operations. What does not depend on the vector that is multiplied is
split off: it is computed once a point (*set-up*), and its results are inputs of the product. Both are then given to the
compiler, and the product also together with the vector arithmetic of a solver's iteration.
"""

from bilevel.compiled.products import DEFAULT_COMPILER, CompiledGraph, check_compile, graph_kind

__all__ = ["DEFAULT_COMPILER", "CompiledGraph", "check_compile", "graph_kind"]
