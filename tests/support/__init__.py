"""Helpers of the tests: oracles, inputs, processes, GPUs that are not there. None of them is a test."""
