"""Jobs on a simulated network: what `reducer simulate` and the comparison with netlab share."""
