"""Messages between rank 0 and a rollout engine in a separate process.

The engine is a server for one client. Rank 0 sends :class:`Start`, and after :class:`EngineReady`
alternates :class:`LoadWeights` and :class:`Generate` or :class:`Converse`. The engine reports any
error by :class:`EngineFailed` and exits: its weights may be half replaced, so only a new process
can be trusted.
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
    """Generate one response to each prompt."""

    weights_version: int
    """The weights that must be loaded."""
    prompts: list[list[int]]
    """Token ids; n prompts."""
    limits: list[int]
    """Maximum number of new tokens of each response."""
    uniforms: bytes
    """(n, T) float64 in native byte order."""
    max_new_tokens: int
    """T, the largest of the limits or more."""
    temperature: float
    sampling: str
    """How a uniform number selects a token (`rollout.sampling`)."""
    eos: list[int]
    look: bool
    """Whether the client checks the text for stop strings during generation."""
    later_turn: bool = False
    """Whether these prompts continue responses of the request before. The prefix cache is then
    kept; otherwise it is emptied, so that results depend on no earlier request."""


class Progress(Message, frozen=True, tag="progress"):
    """Sent regularly while generating. The engine waits for :class:`Continue`."""

    done: int
    """Tokens; a response that has ended counts with the maximum length."""
    total: int
    tokens: dict[int, list[int]] = {}
    """With `look`: row → all its tokens so far, for rows with new tokens."""


class Continue(Message, frozen=True, tag="continue"):
    """The reply to :class:`Progress`."""

    stop: list[int] = []
    """Rows whose response has ended."""


class Generated(Message, frozen=True, tag="generated"):
    """The responses. The arrays have a row for each prompt, padded with 0 to T."""

    weights_version: int
    """The weights that generated them."""
    lengths: list[int]
    ids: bytes
    """(n, T) int32."""
    logprobs: bytes
    """(n, T) float32: of the sampled tokens, at the temperature."""
    entropies: bytes
    """(n, T) float32, in nats."""
    seconds: float


class Converse(Message, frozen=True, tag="converse"):
    """Generate the turns of responses that have several, each as soon as it can begin.

    The engine sends :class:`TurnsProgress`, at first with nothing done, and waits each time for
    :class:`NextTurns`, until that is the last. Then it sends :class:`Conversed`.
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
    """As in :class:`Generate`."""
    eos: list[int]
    look: bool
    """As in :class:`Generate`."""


class EndedTurn(Struct, frozen=True, array_like=True):
    """A turn of the policy."""

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


class TurnsProgress(Message, frozen=True, tag="turns_progress"):
    """Sent when turns have ended, and regularly. The engine waits for :class:`NextTurns`."""

    weights_version: int
    """The weights that generate."""
    busy: bool
    """Whether the engine has turns to generate or to send."""
    ended: list[EndedTurn] = []
    tokens: dict[int, list[int]] = {}
    """With `look`: row → all tokens so far of a turn that has not ended, if some are new."""


class NextTurns(Message, frozen=True, tag="next_turns"):
    """The reply to :class:`TurnsProgress`."""

    turns: list[NextTurn] = []
    """To generate; none of a response whose last turn has not ended."""
    stop: list[int] = []
    """Rows whose turn has ended."""
    last: bool = False
    """Whether the request ends here. Turns that have not ended are dropped."""


class Conversed(Message, frozen=True, tag="conversed"):
    """The end of :class:`Converse`."""

    weights_version: int


class EngineFailed(Message, frozen=True, tag="engine_failed"):
    """The engine cannot carry out a request, and exits."""

    text: str
    user_input: bool = False
    """Whether the configuration or the environment is wrong."""
    final: bool = False
    """Whether a new process would fail in the same way."""


ToEngine = Start | LoadWeights | Generate | Continue | Converse | NextTurns
FromEngine = (
    EngineReady | WeightsLoaded | Progress | Generated | TurnsProgress | Conversed | EngineFailed
)

decode_to_engine: Callable[[bytes], ToEngine] = decoder(ToEngine, "a message to the rollout engine")
"""Decodes rank 0's message. Raises LinkError."""
decode_from_engine: Callable[[bytes], FromEngine] = decoder(
    FromEngine, "a message of the rollout engine"
)
"""Decodes the engine's message. Raises LinkError."""
