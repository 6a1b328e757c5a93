"""The workloads written for one library each: ``sides/LIBRARY/WORKLOAD.py``."""
