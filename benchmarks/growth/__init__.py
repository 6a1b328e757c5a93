"""How time and memory grow with the size of a problem, for this library and its peers.

python -m benchmarks.growth [AXIS …]
"""
