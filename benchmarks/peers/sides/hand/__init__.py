"""Loops written by hand: the least number of passes, no checks."""
