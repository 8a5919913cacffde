"""Parts that belong to one model family."""
