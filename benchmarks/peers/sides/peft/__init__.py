"""Workloads written for PEFT."""
