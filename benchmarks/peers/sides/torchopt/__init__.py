"""Workloads written for TorchOpt."""
