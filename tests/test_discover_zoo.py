"""Networks of other libraries, with random weights: the connections found are the true ones.

The true numbers are written down from the libraries' own code: a Transformer block of attention and
feed-forward adds twice, a ResNet's or ConvNeXt's block once.
"""

import importlib
import sys

import pytest
import torch

from addnorm import xray
from addnorm.probe.discover import discover

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own warnings
DECLARED = []


def load(name):
    """Import a library; a torchvision that was built for another torch lacks two operators."""
    if name == "timm":
        try:
            importlib.import_module("torchvision")
        except ModuleNotFoundError:
            pytest.skip("timm needs torchvision, which is not installed")
        except RuntimeError:
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]
            DECLARED.append(torch.library.Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float t) -> Tensor")
    return pytest.importorskip(name)


TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def tokens():
    return torch.randint(0, 50, (2, 7))


def text(**more):
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def transformer(kind, config, **options):
    library = load("transformers")
    return getattr(library, kind)(getattr(library, config)(**options))


HF = {
    "gpt2": (
        lambda: transformer(
            "GPT2LMHeadModel", "GPT2Config", n_layer=3, n_embd=16, n_head=2, vocab_size=50
        ),
        text,
        [f"transformer.h.{i}.{part}" for i in range(3) for part in ("attn", "mlp")],
    ),
    "llama": (
        lambda: transformer(
            "LlamaForCausalLM", "LlamaConfig", intermediate_size=32, vocab_size=50, **TINY
        ),
        text,
        [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")],
    ),
    "bert": (
        lambda: transformer("BertModel", "BertConfig", intermediate_size=32, vocab_size=50, **TINY),
        text,
        [f"encoder.layer.{i}.{part}" for i in range(3) for part in ("attention", "output")],
    ),
    "vit": (
        lambda: transformer(
            "ViTForImageClassification",
            "ViTConfig",
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            **TINY,
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
        6,
    ),
    "t5 encoder": (
        lambda: transformer(
            "T5EncoderModel",
            "T5Config",
            num_layers=3,
            d_model=16,
            d_ff=32,
            num_heads=2,
            d_kv=8,
            vocab_size=50,
        ),
        text,
        [
            f"encoder.block.{i}.layer.{j}.{part}"
            for i in range(3)
            for j, part in enumerate(("SelfAttention", "DenseReluDense"))
        ],
    ),
    # Three additions a layer in the decoder: self-attention, cross-attention, feed-forward.
    "t5": (
        lambda: transformer(
            "T5Model",
            "T5Config",
            num_layers=2,
            num_decoder_layers=2,
            d_model=16,
            d_ff=32,
            num_heads=2,
            d_kv=8,
            vocab_size=50,
        ),
        lambda: text(decoder_input_ids=tokens()),
        10,
    ),
    # One addition a layer: x + (attention + feed-forward).
    "gpt-neox, parallel": (
        lambda: transformer(
            "GPTNeoXModel",
            "GPTNeoXConfig",
            intermediate_size=32,
            vocab_size=50,
            use_parallel_residual=True,
            **TINY,
        ),
        text,
        3,
    ),
    # Experts that are added to each other inside the branch.
    "mixtral": (
        lambda: transformer(
            "MixtralModel",
            "MixtralConfig",
            intermediate_size=32,
            vocab_size=50,
            num_key_value_heads=2,
            num_local_experts=4,
            **TINY,
        ),
        text,
        6,
    ),
    # A scan and D x are added inside the branch.
    "mamba": (
        lambda: transformer(
            "MambaModel",
            "MambaConfig",
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            state_size=4,
        ),
        lambda: {"input_ids": tokens()},
        [f"layers.{i}.mixer" for i in range(3)],
    ),
    # Two kinds of attention scores are added inside the branch.
    "xlnet": (
        lambda: transformer(
            "XLNetModel",
            "XLNetConfig",
            vocab_size=50,
            d_model=16,
            n_layer=3,
            n_head=2,
            d_inner=32,
        ),
        text,
        [f"layer.{i}.{part}" for i in range(3) for part in ("rel_attn", "ff")],
    ),
    # One layer called three times.
    "albert": (
        lambda: transformer(
            "AlbertModel",
            "AlbertConfig",
            intermediate_size=32,
            vocab_size=50,
            embedding_size=8,
            **TINY,
        ),
        text,
        6,
    ),
}


def check(model, inputs, wanted):
    structure = discover(model, inputs)
    count = wanted if isinstance(wanted, int) else len(wanted)
    assert len(structure) == count, f"{structure.coverage}: {structure.names}"
    assert len(set(structure.names)) == count
    assert not structure.coverage.fallbacks
    assert not structure.coverage.opaque
    if not isinstance(wanted, int):
        assert list(structure.names) == wanted
    return structure


@pytest.mark.parametrize("name", HF)
def test_transformers(name):
    make, inputs, wanted = HF[name]
    torch.manual_seed(0)
    model = make()
    check(model, inputs(), wanted)
    trace = xray(model, inputs())
    assert all(c.branch_share > 0 and c.gradient_before > 0 for c in trace.connections)


@pytest.mark.parametrize(
    ("name", "count", "projected", "options"),
    [
        ("resnet50", 16, 4, {}),
        ("resnetv2_50", 16, 4, {}),
        ("vit_small_patch16_224", 24, 0, {"img_size": 32}),
        ("convnext_tiny", 18, 0, {}),
        ("mixer_b16_224", 24, 0, {"img_size": 32}),
        ("mvitv2_tiny", 20, 3, {"img_size": 64}),  # pooled queries are added inside attention
    ],
)
def test_timm(name, count, projected, options):
    torch.manual_seed(0)
    model = load("timm").create_model(name, **options).eval()
    structure = check(model, torch.randn(2, 3, 32, 32), count)
    assert sum(j.projected for j in structure.joins) == projected
