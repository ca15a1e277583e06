"""What an engine does to a request before it tokenises: `chat_completions` (messages -> prompt)."""
