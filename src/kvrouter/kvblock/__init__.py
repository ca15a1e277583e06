"""The index of block keys: `base` is the contract, `token_processor` makes the keys, one file per backend."""
