"""Tensors as coded bytes: levels, symbols, contexts, an entropy coder, and the file that holds them."""
