"""The supervisor's end of a rank's link, for tests of boundaries."""

import threading

from engine.protocol import frames, rank_messages, sockets
from engine.protocol.rank_messages import CheckpointComplete, CheckpointWritten, Confirm

METRICS = {"objective/scores": 1.0, "objective/kl": 0.5}
"""Of a step, as few as a boundary needs."""
DEADLINE = 120
"""Seconds; generous, for a busy machine."""


class Supervisor:
    """The other end of a link: records messages, and confirms checkpoints once allowed."""

    def __init__(self, folder):
        self.listener, self.path = sockets.listen(folder)
        self.received = []
        self.may_confirm = threading.Event()
        self.alerts = []
        """The first steps of alerts, as each confirmation names them."""
        self.needed = []
        """Steps of checkpoints that must not be removed, the same."""
        self.confirms_removals = True
        """Whether it replies to what a save has removed, as one with a locked journal does not."""
        self._arrived = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        self.peer, _ = self.listener.accept()
        with self.peer.makefile("rb") as stream:
            while header := stream.read(frames.HEADER.size):
                message = rank_messages.decode_from_rank(stream.read(frames.frame_length(header)))
                with self._arrived:
                    self.received.append(message)
                    self._arrived.notify_all()
                removal = isinstance(message, CheckpointComplete) and self.confirms_removals
                if removal or isinstance(message, CheckpointWritten):
                    threading.Thread(target=self._confirm, args=(message.step,)).start()

    def _confirm(self, step):
        if self.may_confirm.wait(DEADLINE):
            self.send(Confirm(step=step, alerts=self.alerts, needed=self.needed))

    def send(self, message):
        self.peer.sendall(frames.encode(message))

    def wait_for(self, kind):
        """Waits for a message of a type; returns the last one."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.of(kind), DEADLINE), f"no {kind.__name__}"
        return self.of(kind)[-1]

    def of(self, kind):
        return [m for m in self.received if isinstance(m, kind)]
