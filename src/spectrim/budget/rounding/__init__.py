"""Weights on levels, for the smallest coded file: steps by rate and distortion, rounding with error feedback."""
