"""Workloads written for BOAT."""
