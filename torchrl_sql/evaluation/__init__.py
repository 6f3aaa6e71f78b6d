"""Evaluation in the emulator, statistics of scores, and reports."""
