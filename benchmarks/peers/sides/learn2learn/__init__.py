"""Workloads written for learn2learn."""
