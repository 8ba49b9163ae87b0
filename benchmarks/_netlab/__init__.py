"""An emulated cluster on one machine, for benchmarks/netlab.py."""
