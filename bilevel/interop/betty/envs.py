"""What problems share beside each other: Betty's ``Env``."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Env"]


class Env:
    """An object that the engine hands to every problem as ``self.env``; problems are its attributes by name.

    Attributes:
        env: Whatever the user puts there.
        train_data_loader: A loader that problems may draw from in their ``get_batch``.
        device: Where the engine runs; set by it.
    """

    env: Any = None
    train_data_loader: Any = None
    device: Any = None

    def initialize(self) -> None:
        """Called once when the engine is made, before its problems are. Nothing by default."""

    def configure_device(self, device: Any) -> None:
        """Called with the engine's device before :meth:`initialize`."""
        self.device = device

    def patch_module(self, module: nn.Module) -> nn.Module:
        """Returns a module on the engine's device."""
        return module.to(self.device)

    def patch_data_loader(self, loader: Any) -> Any:
        """Returns the loader as it is."""
        return loader
