"""Tasks together, by hand with `torch.func.vmap`."""
