"""The peak memory of a step on one device, by part, in bytes.

What autograd keeps is counted tensor by tensor. The CUDA context, libraries, and memory that an
allocator holds unused are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from poweropd.kernels.head import chunk_rows
from poweropd.kernels.softmax import TILE_BYTES
from poweropd.models.geometry import Geometry

GIB = 2**30
FLOAT32 = 4
PHASES = ("rollout", "score", "update")
#: host: on the device only to score; student: in the student's own weights.
TeacherPlaceInMemory = Literal["device", "host", "servers", "student"]


@dataclass(frozen=True)
class Setup:
    """All that memory depends on beside the two geometries."""

    completions: int  # completions of a step on this device
    prompt: int  # tokens
    completion: int  # tokens, at most
    max_tokens: int  # tokens of a micro-batch
    teacher_max_tokens: int  # tokens of the teacher's micro-batch
    compute: int  # bytes of a number in the student's forward and backward
    master: int  # bytes of a number of the student's weights
    teacher: int  # bytes of a number of the teacher
    rollout_batch: int = 128
    reads_along: bool = False  # the teacher; the update needs its hidden states
    checkpointing: bool = False
    lora_rank: int | None = None
    lora_parameters: int = 0
    padded: bool = True  # sequences differ in length, so that attention gets a mask
    device: str = "cuda"
    shards: int = 1  # processes that share the student's weights, gradients and moments
    samples: Literal["transformers", "vllm", "server"] = "transformers"
    vllm_bytes: int = 0  # memory of the device that vLLM takes while it samples
    teacher_at: TeacherPlaceInMemory = "device"
    averaged: bool = False  # a moving average of the trained weights is kept
    teacher_linear: float | None = None  # bytes of a number of the teacher's quantized linears
    reference: int = 0  # bytes of a number of the reward's reference model
    reference_max_tokens: int = 0  # tokens of its micro-batch
    reference_at: TeacherPlaceInMemory = "device"

    @property
    def mixed(self) -> bool:
        """Returns whether autocast runs matmuls in another dtype than the weights'."""
        return self.compute != self.master

    @property
    def casts_layers(self) -> bool:
        """Returns whether autograd keeps a cast copy of each layer; gathered shards need none."""
        return self.mixed and self.shards == 1

    @property
    def copies(self) -> bool:
        """Returns whether transformers samples from a copy of the student."""
        return self.samples == "transformers" and (self.mixed or self.shards > 1)

    @property
    def length(self) -> int:
        """Returns the tokens read of a sequence: all but the last, which predicts nothing."""
        return self.prompt + self.completion - 1

    def sequences(self, max_tokens: int) -> int:
        """Returns the number of sequences of a micro-batch."""
        return min(self.completions, max(1, max_tokens // self.length))


@dataclass(frozen=True)
class Part:
    """A part of the memory, and the phases in which it is held."""

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES


@dataclass(frozen=True)
class Memory:
    """The memory of a step on one device."""

    parts: Sequence[Part]

    def held(self, phase: str) -> int:
        """Returns the bytes that are held in a phase."""
        return sum(part.bytes for part in self.parts if phase in part.phases)

    @property
    def peak(self) -> int:
        return max(map(self.held, PHASES))

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.held)


def layer_activations(geometry: Geometry, setup: Setup, tokens: int) -> int:
    """Counts what autograd keeps of one layer for a micro-batch of `tokens`, padding included.

    For each token it keeps the inputs of the norms in float32, with what the gradients of their
    weights need; the inputs of the linear maps; queries, keys, values and the output of SDPA with
    its log-sum-exp; four intermediates of the MLP. Autocast casts the input of a linear map each
    time, and each weight once.
    """
    g, compute = geometry, setup.compute
    residual = max(compute, setup.master)
    lora = setup.lora_rank is not None
    norm_weight = 0 if lora else 1  # a frozen weight needs nothing
    norms = 2 * (g.hidden * (FLOAT32 + norm_weight * residual) + FLOAT32)
    norms += (g.query + g.key_value) * (FLOAT32 + norm_weight * compute)
    norms += (g.heads + g.kv_heads) * FLOAT32
    inputs = compute * g.hidden * (5 if setup.mixed else 2)
    # A mask, [sequences, 1, length, length], also makes SDPA repeat keys and values.
    repeated = g.query if setup.padded else g.key_value
    attention = compute * (2 * g.query + 2 * repeated) + FLOAT32 * g.heads
    mask = compute * setup.length if setup.padded else 0
    mlp = compute * 4 * g.mlp
    adapters = compute * len(g.linears) * setup.lora_rank if setup.lora_rank else 0
    adapters += compute * g.query if lora and setup.mixed else 0
    kept = tokens * (norms + inputs + attention + mask + mlp + adapters)
    cast = g.linear_parameters + setup.lora_parameters // g.layers
    return kept + (compute * cast if setup.casts_layers else 0)


def activations(geometry: Geometry, setup: Setup, tokens: int) -> int:
    """Counts what autograd keeps of the student's body for a micro-batch of `tokens`."""
    residual = max(setup.compute, setup.master)
    last_norm = geometry.hidden * (FLOAT32 + (0 if setup.lora_rank else residual)) + FLOAT32
    ids = 8
    layer = layer_activations(geometry, setup, tokens)
    if setup.checkpointing:  # It keeps the layers' inputs, and one layer while it recomputes it.
        body = geometry.layers * tokens * geometry.hidden * residual + layer
    else:
        body = geometry.layers * layer
    return body + tokens * (last_norm + ids)


def forward_workspace(geometry: Geometry, number: int, tokens: int, mask: int) -> int:
    """Returns the workspace of a forward without a gradient: that of a layer at its widest.

    number: bytes of a number. The MLP holds input, residual, gate, up and their product; attention
    holds input, residual, queries, repeated keys and values, and output.
    """
    mlp = 2 * geometry.hidden + 3 * geometry.mlp
    attention = 2 * geometry.hidden + 4 * geometry.query
    # The mask is made once in bools, and once in numbers by each layer.
    return tokens * (number * max(mlp, attention + mask) + mask)


def head_chunk(geometry: Geometry, setup: Setup, tokens: int, buffers: int) -> int:
    """Returns the [n, V] float32 buffers of a head over `tokens`, and one more in low precision.

    A tile of the softmax comes on top; a full-vocabulary head needs five: for probabilities, reward
    and the intermediates of the reward and its divergence.
    """
    logits = geometry.vocab * FLOAT32  # of one token
    like = torch.empty(tokens, 0, device="cpu" if setup.device == "cpu" else "meta")
    at_once = chunk_rows(like, geometry.vocab, buffers, None)
    low = geometry.vocab * setup.compute if setup.compute < FLOAT32 else 0
    tiles = 1 if buffers == 1 else 5
    tile = min(TILE_BYTES[setup.device], at_once * logits)
    return at_once * (logits * buffers + low) + tiles * tile


def head_gradient(geometry: Geometry, setup: Setup, tokens: int) -> int:
    """Returns the gradients of weight and hidden states, which the head forms in its forward."""
    weight = geometry.vocab * geometry.hidden
    total = 2 * tokens * geometry.hidden * setup.compute  # hidden states and their gradient
    if setup.mixed:
        total += weight * setup.compute  # the head's cast weight
    if setup.lora_rank is None:
        total += weight * FLOAT32 + (weight * setup.compute if setup.mixed else 0)
    return total


def kv_cache(geometry: Geometry, setup: Setup) -> int:
    """Returns keys and values of all completions that are sampled at once, at their longest."""
    sequences = min(setup.rollout_batch, setup.completions)
    tokens = sequences * (setup.prompt + setup.completion)
    # A layer's keys are copied when a token is appended.
    return tokens * geometry.key_value * setup.compute * (2 * geometry.layers + 1)


def sampling(geometry: Geometry, setup: Setup) -> int:
    """Returns the [B, V] logits, two copies in float32, and probabilities and sums in float64."""
    sequences = min(setup.rollout_batch, setup.completions)
    return sequences * geometry.vocab * (setup.compute + 2 * FLOAT32 + 2 * 8)


def gathered(geometry: Geometry, setup: Setup, chunk: int) -> int:
    """Returns what a sharded student gathers whole in the update, beside its shards.

    Embeddings, head and last norm are whole from the forward to the end of the backward. In the
    backward one layer is whole, the next is being gathered, and a layer's gradient is there in the
    compute dtype and in float32. `chunk` is the bytes of the head's chunk, which is free by then.
    """
    if setup.shards == 1:
        return 0
    adapter = setup.lora_parameters // geometry.layers
    layer = geometry.layer_parameters + adapter
    gradient = (adapter if setup.lora_rank else layer) * (setup.compute + FLOAT32)
    in_layers = 2 * layer * setup.compute + gradient
    return geometry.outer_parameters * setup.master + max(0, in_layers - chunk)


def teacher_weights(teacher: Geometry, setup: Setup) -> int:
    if setup.teacher_linear is None:
        return teacher.parameters * setup.teacher
    linear = teacher.layers * teacher.linear_parameters
    return int(linear * setup.teacher_linear) + (teacher.parameters - linear) * setup.teacher


def rollout_parts(student: Geometry, weights: int, setup: Setup) -> list[Part]:
    """Returns what sampling holds on this device beside the student itself."""
    if setup.samples == "vllm":  # it sleeps through the rest of the step
        return [Part("vLLM", setup.vllm_bytes, ("rollout",))]
    if setup.samples == "server":
        return []
    return [
        Part("their copy for rollouts", weights * setup.compute if setup.copies else 0),
        Part("KV cache", kv_cache(student, setup), ("rollout",)),
        Part("sampling", sampling(student, setup), ("rollout",)),
    ]


def teacher_parts(teacher: Geometry, setup: Setup) -> list[Part]:
    """Returns what the teacher holds on this device: nothing if it is behind servers."""
    if setup.teacher_at == "servers":
        return []
    weights = 0 if setup.teacher_at == "student" else teacher_weights(teacher, setup)
    phases = ("score",) if setup.teacher_at == "host" else PHASES
    # A teacher that reads along reads the student's micro-batches; the update computes its head.
    sequences = setup.sequences(setup.max_tokens if setup.reads_along else setup.teacher_max_tokens)
    mask = setup.length if setup.padded else 0
    workspace = forward_workspace(teacher, setup.teacher, sequences * setup.length, mask)
    chunk = head_chunk(teacher, setup, sequences * setup.completion, buffers=1)
    return [
        Part("teacher weights", weights, phases),
        Part("teacher activations", workspace, ("score",)),
        Part("teacher head chunk", 0 if setup.reads_along else chunk, ("score",)),
    ]


def reference_parts(reference: Geometry | None, setup: Setup) -> list[Part]:
    """Returns what the reward's reference model holds, which scores as a teacher does."""
    if reference is None:
        return []
    own = replace(
        setup,
        teacher=setup.reference,
        teacher_max_tokens=setup.reference_max_tokens,
        teacher_at=setup.reference_at,
        teacher_linear=None,
        reads_along=False,
    )
    parts = teacher_parts(reference, own)
    return [replace(part, name=part.name.replace("teacher", "reference")) for part in parts]


def update_parts(student: Geometry, teacher: Geometry, trained: int, setup: Setup) -> list[Part]:
    """Returns the gradients of `trained` parameters, and what a micro-batch holds to form them."""
    sequences = setup.sequences(setup.max_tokens)
    loss = sequences * setup.completion  # tokens
    read_along = loss * teacher.hidden * setup.teacher if setup.reads_along else 0
    chunk = head_chunk(student, setup, loss, buffers=2 if setup.reads_along else 1)
    parts = {
        "gradients": trained * setup.master // setup.shards,
        "gathered from shards": gathered(student, setup, chunk),
        "student activations": activations(student, setup, sequences * setup.length),
        "head chunk": chunk,
        "head gradient": head_gradient(student, setup, loss) + read_along,
    }
    return [Part(name, size, ("update",)) for name, size in parts.items()]


def of_step(
    student: Geometry, teacher: Geometry, setup: Setup, reference: Geometry | None = None
) -> Memory:
    """Returns the memory of a step by part, on one of the devices of a data-parallel run."""
    trained = setup.lora_parameters if setup.lora_rank else student.parameters
    weights = student.parameters + (setup.lora_parameters if setup.lora_rank else 0)
    return Memory(
        [
            Part("student weights", weights * setup.master // setup.shards),
            Part("AdamW moments", 2 * trained * setup.master // setup.shards),
            *([Part("moving average", trained * setup.master)] if setup.averaged else []),
            *teacher_parts(teacher, setup),
            *reference_parts(reference, setup),
            *rollout_parts(student, weights, setup),
            *update_parts(student, teacher, trained, setup),
        ]
    )
