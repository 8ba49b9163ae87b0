"""What the benchmarks share: units, formulas, exact inputs, ranks under control, and reports."""
