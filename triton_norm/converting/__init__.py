"""Converts the norms of existing models, and folds them: classes by lists, each checked by numbers."""
