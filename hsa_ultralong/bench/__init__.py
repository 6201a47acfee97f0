"""Speed and memory of the operators: `hsa bench ops`. Form of the numbers: docs/results.md, suite ops."""
