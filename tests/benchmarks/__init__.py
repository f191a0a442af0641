"""Speed and memory, each against a stated baseline: ``python -m tests.benchmarks NAME``. Never part of the tests."""
