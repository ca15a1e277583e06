"""GPTQ: the packed format of checkpoints (`packing`), and the quantiser that writes them (`quantize`)."""
