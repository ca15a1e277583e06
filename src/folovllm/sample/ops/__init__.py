"""Operations on rows of logits."""
