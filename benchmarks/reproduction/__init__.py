"""The problems of benchopt's bilevel benchmark, solved with every method of this library.

python -m benchmarks.reproduction --data FOLDER --output docs/reproduction
"""
