"""Workloads written for Betty."""
