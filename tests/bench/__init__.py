"""Benchmarks behind the README's figures: `python -m tests.bench NAME --json FILE`."""
