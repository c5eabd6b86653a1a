"""Peak memory of a step on one device, by part: what autograd keeps is counted tensor by tensor.

Bytes throughout. Not counted: the CUDA context, libraries, and what an allocator holds unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from poweropd.kernels.head import chunk_rows
from poweropd.kernels.softmax import TILE_BYTES
from poweropd.models.geometry import Geometry

GIB = 2**30
FLOAT32 = 4
PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Setup:
    """What memory depends on beside the two geometries."""

    completions: int  # of a step, on this device
    prompt: int  # tokens
    completion: int  # tokens, at most
    max_tokens: int  # of a micro-batch
    teacher_max_tokens: int
    compute: int  # bytes of a number, as are the next two
    master: int
    teacher: int
    rollout_batch: int = 128
    reads_along: bool = False  # the teacher, in the update: its hidden states are needed there
    checkpointing: bool = False
    lora_rank: int | None = None
    lora_parameters: int = 0
    padded: bool = True  # sequences differ in length, so that attention gets a mask
    device: str = "cuda"
    shards: int = 1  # processes that share the student's weights, gradients and moments
    samples: Literal["transformers", "vllm", "server"] = "transformers"
    vllm_bytes: int = 0  # what vLLM takes of the device while it samples
    teacher_at: Literal["device", "host", "servers"] = "device"  # host: but for scoring
    teacher_linear: float | None = None  # bytes of a quantized number of its linear layers

    @property
    def mixed(self) -> bool:
        """Autocast: weights of one dtype, matmuls of another."""
        return self.compute != self.master

    @property
    def casts_layers(self) -> bool:
        """Autograd keeps a cast copy of each layer; shards are gathered in the compute dtype."""
        return self.mixed and self.shards == 1

    @property
    def copies(self) -> bool:
        """transformers samples from a copy of the student."""
        return self.samples == "transformers" and (self.mixed or self.shards > 1)

    @property
    def length(self) -> int:
        """Tokens read of a sequence: the last one predicts nothing."""
        return self.prompt + self.completion - 1

    def rows(self, max_tokens: int) -> int:
        """Sequences of a micro-batch."""
        return min(self.completions, max(1, max_tokens // self.length))


@dataclass(frozen=True)
class Part:
    """Bytes of one kind; `phases` says when they are held."""

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES

    @property
    def always(self) -> bool:
        return self.phases == PHASES


@dataclass(frozen=True)
class Memory:
    parts: Sequence[Part]

    def held(self, phase: str) -> int:
        return sum(part.bytes for part in self.parts if phase in part.phases)

    @property
    def peak(self) -> int:
        return max(map(self.held, PHASES))

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.held)


def layer_activations(geometry: Geometry, setup: Setup, tokens: int) -> int:
    """What autograd keeps of one layer for a micro-batch of `tokens`, padding included.

    Per token: inputs of the norms in float32, with what their weights' gradients need; inputs of
    the linear maps; queries, keys, values and output of SDPA with its log-sum-exp; four
    intermediates of the MLP. Autocast casts a linear map's input each time, and each weight once.
    """
    g, compute = geometry, setup.compute
    residual = max(compute, setup.master)
    lora = setup.lora_rank is not None
    norm_weight = 0 if lora else 1  # a frozen one needs nothing
    norms = 2 * (g.hidden * (FLOAT32 + norm_weight * residual) + FLOAT32)
    norms += (g.query + g.key_value) * (FLOAT32 + norm_weight * compute)
    norms += (g.heads + g.kv_heads) * FLOAT32
    inputs = compute * g.hidden * (5 if setup.mixed else 2)
    # A mask, [rows, 1, length, length], also makes SDPA repeat keys and values.
    repeated = g.query if setup.padded else g.key_value
    attention = compute * (2 * g.query + 2 * repeated) + FLOAT32 * g.heads
    mask = compute * setup.length if setup.padded else 0
    mlp = compute * 4 * g.mlp
    adapters = compute * len(g.linears) * setup.lora_rank if setup.lora_rank else 0
    adapters += compute * g.query if lora and setup.mixed else 0
    kept = tokens * (norms + inputs + attention + mask + mlp + adapters)
    return kept + (compute * layer_weights(geometry, setup) if setup.casts_layers else 0)


def layer_weights(geometry: Geometry, setup: Setup) -> int:
    """Numbers that autocast casts in a layer."""
    return geometry.linear_parameters + setup.lora_parameters // geometry.layers


def activations(geometry: Geometry, setup: Setup, tokens: int) -> int:
    """What autograd keeps of the student's body for a micro-batch of `tokens`."""
    residual = max(setup.compute, setup.master)
    last_norm = geometry.hidden * (FLOAT32 + (0 if setup.lora_rank else residual)) + FLOAT32
    ids = 8
    layer = layer_activations(geometry, setup, tokens)
    if setup.checkpointing:  # the layers' inputs, and one layer when it is recomputed
        body = geometry.layers * tokens * geometry.hidden * residual + layer
    else:
        body = geometry.layers * layer
    return body + tokens * (last_norm + ids)


def forward_workspace(geometry: Geometry, number: int, tokens: int, mask: int) -> int:
    """Of a forward without a gradient: the widest moment of a layer, for numbers of so many bytes.

    That is the MLP's (input, residual, gate, up and their product) or attention's (input,
    residual, queries, keys and values repeated, output).
    """
    mlp = 2 * geometry.hidden + 3 * geometry.mlp
    attention = 2 * geometry.hidden + 4 * geometry.query
    # The mask is made once in bools, and once in numbers by each layer.
    return tokens * (number * max(mlp, attention + mask) + mask)


def head_chunk(geometry: Geometry, setup: Setup, tokens: int, buffers: int) -> int:
    """The [n, V] float32 buffers of a head over `tokens`, with one more in low precision.

    With them a tile of the softmax, or five of a full-vocabulary one: probabilities, reward, and
    what it and its divergence make on their way.
    """
    row = geometry.vocab * FLOAT32
    like = torch.empty(tokens, 0, device="cpu" if setup.device == "cpu" else "meta")
    rows = chunk_rows(like, geometry.vocab, buffers, None)
    low = geometry.vocab * setup.compute if setup.compute < FLOAT32 else 0
    tiles = 1 if buffers == 1 else 5
    return rows * (row * buffers + low) + tiles * min(TILE_BYTES[setup.device], rows * row)


def head_gradient(geometry: Geometry, setup: Setup, tokens: int) -> int:
    """The gradients that the head forms in its forward, of weight and hidden states."""
    weight = geometry.vocab * geometry.hidden
    total = 2 * tokens * geometry.hidden * setup.compute  # hidden states and their gradient
    if setup.mixed:
        total += weight * setup.compute  # the head's cast weight
    if setup.lora_rank is None:
        total += weight * FLOAT32 + (weight * setup.compute if setup.mixed else 0)
    return total


def kv_cache(geometry: Geometry, setup: Setup) -> int:
    """Keys and values of all completions that are sampled at once, at their longest."""
    sequences = min(setup.rollout_batch, setup.completions)
    tokens = sequences * (setup.prompt + setup.completion)
    # A layer's keys are copied when a token is appended.
    return tokens * geometry.key_value * setup.compute * (2 * geometry.layers + 1)


def sampling(geometry: Geometry, setup: Setup) -> int:
    """[B, V]: logits, the same in float32 twice, probabilities and their sum in float64."""
    sequences = min(setup.rollout_batch, setup.completions)
    return sequences * geometry.vocab * (setup.compute + 2 * FLOAT32 + 2 * 8)


def gathered(geometry: Geometry, setup: Setup, chunk: int) -> int:
    """What a sharded student has whole in the update, beside its shards.

    Embeddings, head and last norm from the forward to the end of the backward. In the backward a
    layer is there and the next on its way, and one's gradient, in the compute dtype and in float32;
    the head's chunk of so many bytes is free by then.
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
    """What sampling takes of this device beside the student itself."""
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
    """A teacher behind servers takes nothing here."""
    if setup.teacher_at == "servers":
        return []
    weights = teacher_weights(teacher, setup)
    phases = ("score",) if setup.teacher_at == "host" else PHASES
    # One that reads along reads the student's micro-batches, and leaves the head to the update.
    rows = setup.rows(setup.max_tokens if setup.reads_along else setup.teacher_max_tokens)
    mask = setup.length if setup.padded else 0
    workspace = forward_workspace(teacher, setup.teacher, rows * setup.length, mask)
    chunk = head_chunk(teacher, setup, rows * setup.completion, buffers=1)
    return [
        Part("teacher weights", weights, phases),
        Part("teacher activations", workspace, ("score",)),
        Part("teacher head chunk", 0 if setup.reads_along else chunk, ("score",)),
    ]


def update_parts(student: Geometry, teacher: Geometry, trained: int, setup: Setup) -> list[Part]:
    """Gradients of `trained` parameters, and what a micro-batch needs to give them."""
    rows = setup.rows(setup.max_tokens)
    loss = rows * setup.completion
    read_along = loss * teacher.hidden * setup.teacher if setup.reads_along else 0
    chunk = head_chunk(student, setup, loss, buffers=2 if setup.reads_along else 1)
    parts = {
        "gradients": trained * setup.master // setup.shards,
        "gathered from shards": gathered(student, setup, chunk),
        "student activations": activations(student, setup, rows * setup.length),
        "head chunk": chunk,
        "head gradient": head_gradient(student, setup, loss) + read_along,
    }
    return [Part(name, size, ("update",)) for name, size in parts.items()]


def of_step(student: Geometry, teacher: Geometry, setup: Setup) -> Memory:
    """Peak memory of a step by part, on one of the devices of a data-parallel run."""
    trained = setup.lora_parameters if setup.lora_rank else student.parameters
    weights = student.parameters + (setup.lora_parameters if setup.lora_rank else 0)
    return Memory(
        [
            Part("student weights", weights * setup.master // setup.shards),
            Part("AdamW moments", 2 * trained * setup.master // setup.shards),
            *teacher_parts(teacher, setup),
            *rollout_parts(student, weights, setup),
            *update_parts(student, teacher, trained, setup),
        ]
    )
