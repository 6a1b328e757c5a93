"""The problems, in plain torch: data, sizes, losses, methods and float64 references; importable everywhere."""
