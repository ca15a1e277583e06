"""Options that change the logits of the rows that use them, before a token is chosen."""
