"""Workloads written for higher."""
