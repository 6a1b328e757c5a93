"""Values that are computed once from a frozen weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["FrozenCache"]


class FrozenCache:
    """What was computed from one frozen weight, made when first needed and again when the weight has changed.

    Changes are seen by the storage (``weight.data = …``, ``module.to(…)``, merging), by the version counter
    (in-place operations) and by shape, dtype and device. What torch does not record cannot be seen:
    ``weight.data.mul_(…)``. It is part of no state dict, copy or pickle.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._storage: StorageWeakRef | None = None
        self._values: dict[object, Tensor] = {}

    def get(self, name: object, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Returns ``compute()``, remembered under a name as long as the weight stays what it is.

        A weight that requires gradients, or was put in place of the layer's own parameter, is not remembered.
        """
        if not _is_frozen_parameter(weight):
            return compute()
        storage = weight.untyped_storage()
        key = (weight._version, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, weight.device)
        # While the weak reference is held, no other storage gets this address.
        if key != self._key or self._storage is None or self._storage.cdata != storage._cdata:
            self._key, self._values = key, {}
            self._storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if name in self._values:
            return self._values[name]
        # A value made in inference mode could not take part in autograd later.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        if type(value) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(value):
            self._values[name] = value
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCache:
        return FrozenCache()

    def __reduce__(self) -> tuple[type[FrozenCache], tuple[()]]:
        return FrozenCache, ()


def _is_frozen_parameter(weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    plain = isinstance(weight, nn.Parameter) and not weight.requires_grad
    return plain and not weight.is_inference() and not weight.is_meta
