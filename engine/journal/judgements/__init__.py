"""Uses of the judgements: their agreement with scores, and data to train on."""
