"""The operators' judgements, and their uses: agreement with scores, pairs, and training data."""
