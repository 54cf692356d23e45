"""Uses of the judgements: their agreement with scores, pairs to export, and data to train on."""
