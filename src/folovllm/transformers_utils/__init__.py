"""What the front end reads of a checkpoint: tokenizer, chat template, a few numbers of its configuration. No torch."""
