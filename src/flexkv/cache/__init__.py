"""The control plane: which blocks every tier holds, and which copies a request needs. Moves no bytes.

Read in this order: `mempool` (free blocks of a tier), `radixtree` (which sequences it holds), `cache_engine` (one
tier), `transfer_pattern` (what copies a request takes), `global_cache_engine` (decides for all tiers).
"""
