"""Rank 0 and another rank, run one after the other in one process."""


def two_ranks():
    """Returns both: what the first broadcasts, the second one gets; and what it has not got yet."""
    sent = []

    class Rank:
        def __init__(self, *, is_lead):
            self.is_lead = is_lead

        def broadcast_bytes(self, data):
            if self.is_lead:
                sent.append(data)
                return data
            return sent.pop(0)

    return Rank(is_lead=True), Rank(is_lead=False), sent
