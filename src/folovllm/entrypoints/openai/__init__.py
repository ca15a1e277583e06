"""The OpenAI-compatible HTTP server: `protocol` (bodies), `serving` (what to do), `api_server` (routes, process)."""
