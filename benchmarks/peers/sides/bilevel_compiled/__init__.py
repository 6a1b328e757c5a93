"""Workloads with this library's compiled solves."""
