"""Workloads written for this library."""
