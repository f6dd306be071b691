"""The first kind of plugin: an algorithm turns the linears of one decoder block into QuantizedWeights.

An algorithm sees one block at a time through `BlockContext` and decides what it watches. It never touches files,
devices of other blocks, or the model around the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from .config import Options, QuantConfig
from .errors import BackendError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .weight import QuantizedWeight


class NoParams(Options):
    """The parameters of an algorithm that has none."""


@dataclass(frozen=True)
class Linear:
    """One linear to quantize.

    name: its full dotted name in the model. weight: [out, in] in the compute dtype, whatever the module's own
    layout (a Conv1D is transposed). bias: [out] in the model's own dtype, or None.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    config: QuantConfig


class Total(Protocol):
    """What `BlockContext.accumulate` adds up over calibration tokens: a Hessian, a mean, a count."""

    def add(self, *x: Tensor) -> None:
        """Add the tokens of x [tokens, in_features]; with `paired` x, and the same tokens in the float model."""

    def tensors(self) -> Sequence[Tensor]:
        """Return the sums themselves: two totals are added up by adding these in place."""


TotalT = TypeVar("TotalT", bound=Total)


class BlockContext(Protocol):
    """What the core offers while one block is quantized.

    Two streams of hidden states run through the model: the quantized stream, what this block receives when all
    earlier blocks are quantized, and (only if the algorithm sets `float_stream`) the float stream of the original
    model. Hidden states come batch by batch, [batch, length, hidden].
    """

    index: int  # which block, from 0
    name: str  # its dotted name, "model.layers.3"
    module: nn.Module  # the block itself, on `device`, in the compute dtype
    device: torch.device
    seed: int
    linears: Mapping[str, Linear]  # by full name, in order of use
    groups: Sequence[tuple[str, ...]]  # linears that share an input, in the order they run
    stages: Sequence[Sequence[tuple[str, ...]]]  # the same, those that run side by side (experts) in one

    @property
    def workers(self) -> int:
        """How many tasks `spread` should get, if the work can be cut so: 1 for a run of one process."""

    def observe(self, names: Sequence[str], visit: Callable[..., None], *, paired: bool = False) -> None:
        """Replay the calibration through the block and call `visit(name, x)` with the inputs of the named linears.

        x is [tokens, in_features] with padding removed, once per batch; its memory is used again after the visit, so copy
        what is to be kept. Linears given by `replace` act with their quantized weight. With `paired`,
        `visit(name, x, x_float)` also gets the same tokens' inputs in the float model (needs `float_stream`). A batch
        stops as soon as every named linear has been seen.
        """

    def accumulate(
        self, names: Sequence[str], make: Callable[[str], TotalT], *, paired: bool = False
    ) -> dict[str, TotalT]:
        """Return for each named linear the total over the calibration: of what `observe` would show, given to `make(name).add`.

        In a run of several processes it is the total over all of them. It is an empty one for a linear that no token reached.
        """

    def spread(self, tasks: list[Task]) -> dict[str, QuantizedWeight]:
        """Do pieces of work that do not depend on each other, each on one of the run's processes; return the weights of all.

        The list is emptied on the way, so that what a task holds goes when it is done.
        """

    def replace(self, name: str, weight: QuantizedWeight) -> None:
        """From now on, replays run this linear with its quantized weight."""

    def batches(self, *, float_stream: bool = False) -> Iterator[tuple[Tensor, dict[str, Any], Tensor | None]]:
        """Yield each batch's (hidden states, keyword arguments of the block, valid-token mask or None)."""

    def batch(self, number: int, *, float_stream: bool = False) -> tuple[Tensor, dict[str, Any], Tensor | None]:
        """Return one of the batches that `batches` yields, for algorithms that visit them in an order of their own."""

    def float_outputs(
        self, names: Sequence[str] = (), visit: Callable[[str, Tensor], None] | None = None
    ) -> Sequence[Tensor]:
        """Return the float model's hidden states after this block, batch by batch: what the quantized block should give.

        On the way `visit(name, x)` is shown the named linears' inputs in the float model, as by `observe`.
        Needs `float_stream`. The stream moves on with this call and is not computed again: what needs its inputs
        (`observe` with `paired`, `batches` with `float_stream`) must come before.
        """

    def forward(
        self,
        hidden: Tensor,
        kwargs: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
        *,
        compiled: bool = False,
    ) -> Tensor:
        """Run the block and return its hidden states, as it stands or with other weights in the named linears.

        weights: [out, in] by full name, whatever the module's own layout; gradients flow into them. compiled: through
        torch.compile, for algorithms that run a block hundreds of times.
        """

    def record(self, name: str, **facts: Any) -> None:
        """Put facts about a linear into the report: error (relative), note (anything a user should know).

        A number may be a tensor [] still being computed; it is read when the block is done.
        """


@dataclass(frozen=True)
class Task:
    """A piece of work for `BlockContext.spread`. names: the linears whose weights `work` returns and whose facts it may record.

    cost: how much work it is beside others; any unit.
    """

    names: Sequence[str]
    cost: float
    work: Callable[[], Mapping[str, QuantizedWeight]]


class Algorithm(ABC):
    """Base of every algorithm plugin. Subclass, set the class attributes, implement `quantize_block`.

    An instance holds validated `params` and nothing else that changes: a run must be resumable at any block.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    Params: ClassVar[type[Options]] = NoParams
    needs_calibration: ClassVar[bool] = True
    #: whether all it makes of the calibration comes through `BlockContext.accumulate`. Then each process of a run of several sees
    #: its share of the batches; else each sees them all and does the same, and the first one's results count
    shares_calibration: ClassVar[bool] = False
    #: how many processes may share one batch, set by the run: 1 when its result must not depend on their number
    processes: int = 1

    def __init__(self, **params: Any) -> None:
        self.params = self.Params.parse(params, f"algorithm {self.name!r}")

    @property
    def float_stream(self) -> bool:
        """Whether this run needs the float model's hidden states beside the quantized ones (twice the memory)."""
        return False

    @property
    def uses_calibration(self) -> bool:
        """Whether these parameters need calibration data at all."""
        return self.needs_calibration

    def facts(self, device: torch.device) -> dict[str, Any]:
        """What beside the parameters decides the bits of a result on this device: which code runs, of which version.

        It stands in reports, and a journal is resumed only where it is the same. Values are plain JSON.
        """
        return {}

    @classmethod
    def build(cls, report: Callable[[str], None]) -> str:
        """Build native code for this machine, telling `report` of each step, and return what was built.

        `qcore build-kernels` calls it on algorithms that override it. The others have none and raise BackendError.
        """
        raise BackendError(f"algorithm {cls.name!r} has no native code to build.")

    @property
    def batch_size(self) -> int | None:
        """Calibration sequences per batch, where the algorithm needs a certain number; a user's own choice goes first."""
        return None

    @property
    def blocks_at_once(self) -> int:
        """How many consecutive blocks `quantize_block` gets as one; the last time fewer where that does not divide them."""
        return 1

    @property
    def keep_on_host(self) -> bool:
        """Whether hidden states stay in host memory between uses even where the device has room for them."""
        return False

    @abstractmethod
    def quantize_block(self, block: BlockContext) -> dict[str, QuantizedWeight]:
        """Return a QuantizedWeight for every linear in `block.linears`."""
