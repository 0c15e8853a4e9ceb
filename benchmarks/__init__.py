"""What Paigeant's speed is measured with. `python -m benchmarks --help`; the findings are in docs/performance.md."""
