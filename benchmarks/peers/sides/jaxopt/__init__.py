"""Workloads written for JAX, with JAXopt where it has the method."""
