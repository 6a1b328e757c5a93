"""Hypergradients beside JAXopt's, on the same problems."""
