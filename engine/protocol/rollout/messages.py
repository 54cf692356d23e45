"""Messages between rank 0 and a rollout engine in a separate process.

The engine is a server for one client. Rank 0 sends :class:`Start`, and after :class:`EngineReady`
alternates :class:`LoadWeights` and :class:`Generate`. The engine reports any error by
:class:`EngineFailed` and exits: its weights may be half replaced, so only a new process can be
trusted.
"""

from collections.abc import Callable

from msgspec import Struct

from engine.protocol.frames import VERSION, Message, decoder

Checksum = tuple[int, int]
"""Sum and sum of squares of the bit patterns of all elements, modulo 2⁶⁴."""

ATTEMPTS = 4
"""Number of an engine's processes that rank 0 loses in a row before the run fails."""


class Start(Message, frozen=True, tag="start"):
    """The model to build, with random weights."""

    model: str
    """Folder with the model's config.json."""
    dtype: str
    max_tokens: int
    """Maximum number of tokens of a prompt and its response together."""
    max_responses: int
    """Maximum number of responses that are generated at once."""
    cache_bytes: int
    """Size of the key-value cache."""
    tensor_parallel: int = 1
    sleep: int = 0
    """Level of vLLM's sleep mode between batches; 0 for none."""
    version: int = VERSION


class EngineReady(Message, frozen=True, tag="engine_ready"):
    """The model is built; its weights are random until the first :class:`WeightsLoaded`."""

    pid: int
    engine: str
    """Name and version, such as `vllm 0.32.0`."""
    packages: dict[str, str] = {}
    """Versions of torch and transformers in the engine's environment."""
    device: str = "cpu"


class TensorInfo(Struct, frozen=True, array_like=True):
    """One tensor of an update."""

    name: str
    """As in a Hugging Face checkpoint."""
    shape: list[int]
    dtype: str
    """As in a safetensors header: F32, BF16 or F16."""
    tied: bool = False
    """Whether it is the same parameter as an earlier tensor; not part of the checksum."""


class LoadWeights(Message, frozen=True, tag="load_weights"):
    """Replace all weights, by those of a file, of memory on a GPU, or of a broadcast."""

    weights_version: int
    """The step whose update produced these weights."""
    path: str
    """A safetensors file in shared memory. With `broadcast`, the rendezvous file of rank 0 and the
    engine's workers; empty if they are already connected."""
    tensors: list[TensorInfo]
    """All tensors, in order."""
    checksum: Checksum | None
    """The checksum of all tensors that are not tied; None if it is known only when all are sent."""
    transfer: str = "file"
    """`rollout.transfer`."""
    handles: bytes = b""
    """With `ipc`: pickled arguments of torch's `rebuild_cuda_tensor`, one tuple per tensor."""
    gpu: str = ""
    """With `ipc`: identifies the GPU that holds the tensors, in any process."""


class WeightsLoaded(Message, frozen=True, tag="weights_loaded"):
    """The engine holds the weights, all of them and no others, and its caches are empty."""

    weights_version: int
    tensors: int
    """Number of tensors loaded."""
    checksum: Checksum | None
    """The checksum of what the model holds; None where it cannot be computed (tensor parallel)."""
    seconds: float


class Generate(Message, frozen=True, tag="generate"):
    """Generate responses, or turns of responses, as the client sends them.

    The engine sends :class:`Progress`, at first with nothing done, and waits each time for
    :class:`NextTurns`, until that is the last. Then it sends :class:`Generated`.
    """

    weights_version: int
    """The weights that must be loaded."""
    at_once: int
    """Maximum number of turns that have been sent and have not ended."""
    max_new_tokens: int
    """Maximum number of new tokens of a turn."""
    at_most: int
    """Maximum number of turns in a message."""
    temperature: float
    sampling: str
    """How a uniform number selects a token (`rollout.sampling`)."""
    eos: list[int]
    look: bool
    """Whether the client checks the text for stop strings during generation."""
    later_turn: bool = False
    """Whether the prompts continue responses of the request before. The prefix cache is then kept;
    otherwise it is emptied, so that results depend on no earlier request."""
    more_turns: bool = False
    """Whether other turns may follow those that end, which are then sent at once."""


class EndedTurn(Struct, frozen=True, array_like=True):
    """A turn of the policy; of a response without an environment the only one."""

    row: int
    """The response's row in the batch."""
    ids: list[int]
    """The sampled tokens; some may be after a stop string."""
    logprobs: bytes
    """(tokens,) float32: of the sampled tokens, at the temperature."""
    entropies: bytes
    """(tokens,) float32, in nats."""


class NextTurn(Struct, frozen=True, array_like=True):
    """A turn of the policy to generate."""

    row: int
    """The response's row in the batch."""
    prompt: list[int]
    """Everything before the turn."""
    uniforms: bytes
    """(limit,) float64 in native byte order; one for each new token that is possible."""


class Progress(Message, frozen=True, tag="progress"):
    """Sent when turns have ended, and regularly. The engine waits for :class:`NextTurns`."""

    weights_version: int
    """The weights that generate."""
    busy: bool
    """Whether the engine has turns to generate or to send."""
    done: int
    """Number of tokens generated since :class:`Generate`."""
    ended: list[EndedTurn] = []
    tokens: dict[int, list[int]] = {}
    """With `look`: row → all tokens so far of a turn that has not ended, if some are new."""


class NextTurns(Message, frozen=True, tag="next_turns"):
    """The reply to :class:`Progress`."""

    turns: list[NextTurn] = []
    """To generate; none of a response whose last turn has not ended."""
    stop: list[int] = []
    """Rows whose turn has ended."""
    last: bool = False
    """Whether the request ends here. Turns that have not ended are dropped."""


class Generated(Message, frozen=True, tag="generated"):
    """The end of :class:`Generate`."""

    weights_version: int


class EngineFailed(Message, frozen=True, tag="engine_failed"):
    """The engine cannot carry out a request, and exits."""

    text: str
    user_input: bool = False
    """Whether the configuration or the environment is wrong."""
    final: bool = False
    """Whether a new process would fail in the same way."""


ToEngine = Start | LoadWeights | Generate | NextTurns
FromEngine = EngineReady | WeightsLoaded | Progress | Generated | EngineFailed

decode_to_engine: Callable[[bytes], ToEngine] = decoder(ToEngine, "a message to the rollout engine")
"""Decodes rank 0's message. Raises LinkError."""
decode_from_engine: Callable[[bytes], FromEngine] = decoder(
    FromEngine, "a message of the rollout engine"
)
"""Decodes the engine's message. Raises LinkError."""
