"""Many ranks: communication, sharding, and where frozen weights are kept."""
