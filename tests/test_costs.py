"""FLOPs by the paper's formula and the true ones; memory against what autograd keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from random_models import peak_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from poweropd.errors import UsageError
from poweropd.models import flops
from poweropd.models.geometry import KNOWN, Geometry
from poweropd.plan import memory

STUDENT, TEACHER = KNOWN["Qwen/Qwen3-0.6B-Base"], KNOWN["Qwen/Qwen3-4B"]
ROWS, LENGTH = 3, 50


def qwen3(geometry: Geometry) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=geometry.vocab,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.mlp,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        tie_word_embeddings=geometry.tied,
        max_position_embeddings=geometry.context or 1024,
    )


def small(layers: int) -> Geometry:
    """Every width differs from the others, so that none can stand for another."""
    return Geometry(layers, 96, 4, 2, 40, 200, 512, tied=True)


@pytest.mark.parametrize("name", KNOWN)
def test_known_geometries_count_the_parameters_of_the_real_architecture(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(qwen3(KNOWN[name]))
    assert KNOWN[name].parameters == sum(p.numel() for p in model.parameters())


def test_a_geometry_comes_back_from_its_config() -> None:
    assert Geometry.from_fields("x", qwen3(TEACHER).to_dict()) == TEACHER


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts": 128}, "mixture of experts .num_experts=128."),
        ({"intermediate_size": None}, "has no intermediate_size"),
    ],
)
def test_what_is_not_modelled_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Geometry.from_fields("x", qwen3(STUDENT).to_dict() | fields)


def test_the_papers_flops() -> None:
    paper = flops.paper_update(STUDENT, TEACHER, 32, 128, 1024)
    shown = [paper.teacher_body, paper.student_body / 3, paper.bodies]
    shown += [paper.teacher_head, paper.student_head, paper.heads]
    assert [round(x / 1e12, 1) for x in shown] == [254.8, 30.6, 346.6, 25.5, 30.6, 56.1]


def test_the_true_flops_are_those_of_the_matmuls() -> None:
    true = flops.update(STUDENT, TEACHER, [(1152, 1024)] * 32)
    assert [round(x / 1e12, 1) for x in (true.bodies, true.total)] == [392.4, 448.5]
    geometry = small(2)
    model = AutoModelForCausalLM.from_config(qwen3(geometry), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(torch.zeros(1, LENGTH, dtype=torch.long))
    # Eager attention computes the masked half as well.
    expected = flops.linears(geometry, LENGTH) + 2 * flops.attention(geometry, LENGTH)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_frozen_weights_and_statistics_change_the_passes() -> None:
    def of(lora: bool, statistics: bool) -> float:
        passes = flops.Passes.of(lora, statistics)
        return flops.update(STUDENT, None, [(1152, 1024)], passes).total

    assert of(True, False) < of(False, False) < of(False, True)
    assert of(False, True) == pytest.approx(4 / 3 * of(False, False))


@contextmanager
def kept(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps, without the parameters themselves."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def bytes_kept(geometry: Geometry, dtypes: tuple[str, str], lora: bool, padded: bool) -> int:
    model = Qwen3ForCausalLM(qwen3(geometry)).to(getattr(torch, dtypes[1]))
    if lora:
        import peft

        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if padded:
        mask[1, 40:] = 0
    base = model.get_base_model() if lora else model
    mixed = dtypes[0] != dtypes[1]
    with kept(model) as sizes, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        base.base_model(torch.zeros_like(mask), attention_mask=mask, use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("dtypes", "lora"),
    [
        (("float32", "float32"), False),
        (("bfloat16", "float32"), False),
        (("bfloat16", "bfloat16"), False),
        (("float32", "float32"), True),
        (("bfloat16", "float32"), True),
    ],
)
def test_activations_are_what_autograd_keeps(
    dtypes: tuple[str, str], lora: bool, padded: bool
) -> None:
    compute, master = (getattr(torch, name).itemsize for name in dtypes)
    one, two = (bytes_kept(small(layers), dtypes, lora, padded) for layers in (1, 2))
    adapter = 4 * sum(map(sum, small(1).linears.values()))
    setup = memory.Setup(
        completions=ROWS, prompt=1, completion=LENGTH, max_tokens=1000, teacher_max_tokens=1000,
        compute=compute, master=master, teacher=4, padded=padded, device="cpu",
        lora_rank=4 if lora else None, lora_parameters=adapter if lora else 0,
    )  # fmt: skip
    tokens = ROWS * LENGTH
    assert two - one == memory.layer_activations(small(1), setup, tokens)
    if lora:  # nothing before the first adapter takes a gradient
        assert one <= memory.activations(small(1), setup, tokens)
    else:  # beside the layers there are the angles of the rotary embedding
        assert memory.activations(small(1), setup, tokens) == pytest.approx(one, rel=0.02)


def test_checkpointing_keeps_the_layers_inputs_and_one_layer() -> None:
    setup = memory.Setup(8, 128, 1024, 8192, 8192, 2, 4, 2)
    again = memory.Setup(8, 128, 1024, 8192, 8192, 2, 4, 2, checkpointing=True)
    layer = memory.layer_activations(STUDENT, setup, 8000)
    saved = memory.activations(STUDENT, setup, 8000) - memory.activations(STUDENT, again, 8000)
    assert saved == (STUDENT.layers - 1) * layer - STUDENT.layers * 8000 * STUDENT.hidden * 4


@pytest.mark.parametrize("path", ["sampled", "full_vocab"])
def test_the_predicted_peak_is_that_of_the_allocator(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the benchmark's small geometry, made a little smaller; tensors, not the C heap."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import common
    import savings

    models = common.Model.of_width(192, 3), common.Model.of_width(256, 3)
    geometry = common.Geometry(
        *models, vocab=2**12, batch=4, prompt=16, completion=112, max_tokens=256
    )
    update = savings.PATHS[path](common.Pair.build(geometry, "fixed"))
    update()  # AdamW's moments, live from here on
    with torch.profiler.profile(profile_memory=True) as profile:
        update()
    step = savings.predicted(geometry, path, "fixed")
    moments = next(part.bytes for part in step.parts if part.name == "AdamW moments")
    assert savings.above_weights(step) - moments == pytest.approx(peak_bytes(profile), rel=0.1)
