"""Values that every layer of `flexkv` speaks: sequences, transfers, requests, configuration, layouts."""
