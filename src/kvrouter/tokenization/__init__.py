"""Text -> token ids: `tokenizer` (one checkpoint's), `pool` (the threads that run it)."""
