"""Attention over the paged KV cache: the operations on its layout (`ops`) and the backends that compute with them."""
