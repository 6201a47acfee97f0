"""Input factories and fp64 oracles, imported by tests and benchmarks only."""
