"""Communication between ranks, sharding, and offloading of frozen weights."""
