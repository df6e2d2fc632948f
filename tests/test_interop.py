"""Hugging Face GPT-2 folders: equal logits both ways, every layout, and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from addnorm.interop import load_gpt2, save_gpt2
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.models.layers import AttentionConfig, EmbeddingConfig, FeedForwardConfig
from addnorm.models.ngpt import NGPT, NGPTConfig

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
TANH = FeedForwardConfig(activation="gelu-tanh")
SHAPE = {"depth": 3, "dim": 16, "heads": 4, "context": 12, "vocab_size": 37}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def theirs(**changes):
    """Return a small GPT-2 of transformers with every parameter random."""
    config = transformers.GPT2Config(
        **{
            "n_layer": 3,
            "n_embd": 16,
            "n_head": 4,
            "n_positions": 12,
            "vocab_size": 37,
            "bos_token_id": None,
            "eos_token_id": None,
            **changes,
        }
    )
    return randomised(transformers.GPT2LMHeadModel(config).eval())


def ours(**changes):
    return randomised(GPT(GPTConfig(**{**SHAPE, "tied": True, "feedforward": TANH, **changes})))


def randomised(model):
    """Random numbers in every parameter, biases and gains too, so that none can go astray."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def agree(one, other, *, vocab_size=37, context=12, atol=1e-4):
    tokens = torch.randint(vocab_size, (3, context))
    with torch.no_grad():
        got, want = (m(tokens) for m in (one, other))
    got, want = (x if isinstance(x, torch.Tensor) else x.logits for x in (got, want))
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def refused(call, *args):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call(*args)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    theirs().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


# -- equal logits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": 24},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_logits_of_their_folder_equal_theirs(tmp_path, changes):
    model = theirs(**changes)
    model.save_pretrained(tmp_path / "hf")
    agree(load_gpt2(tmp_path / "hf"), model)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False},
        {"feedforward": FeedForwardConfig(activation="gelu", hidden=20)},
        {"feedforward": FeedForwardConfig(activation="relu2")},
        {"feedforward": FeedForwardConfig(activation="silu")},
        {"attention": AttentionConfig(kv_heads=4)},
        {"dropout": 0.2, "embedding": EmbeddingConfig(embedding_dropout=0.3)},
        {"depth": 1, "heads": 1},
    ],
)
def test_transformers_reads_what_we_write(tmp_path, changes):
    model = ours(**changes)
    save_gpt2(model, tmp_path / "out")
    read, facts = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(facts[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    agree(read.eval(), model)


def test_gradients_of_a_read_model_equal_theirs(folder):
    """The fused matrix is (in, out) there: its gradient too is the transposed one."""
    one, other = load_gpt2(folder), transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.randint(37, (3, 12))
    weights = torch.randn(3, 12, 37)
    (one(tokens) * weights).sum().backward()
    (other(tokens).logits * weights).sum().backward()
    pairs = {
        "stack.connections.2.branch.qkv.weight": "transformer.h.1.attn.c_attn.weight",
        "stack.connections.5.branch.out.weight": "transformer.h.2.mlp.c_proj.weight",
        "token.weight": "transformer.wte.weight",
    }
    for mine, their in pairs.items():
        got, want = one.get_parameter(mine).grad, other.get_parameter(their).grad
        want = want if mine == "token.weight" else want.T
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_writing_and_reading_return_the_same_model(tmp_path):
    model = ours(
        dropout=0.1,
        embedding=EmbeddingConfig(embedding_dropout=0.2),
        attention=AttentionConfig(attention_dropout=0.3),
        feedforward=FeedForwardConfig(activation="gelu-tanh", hidden=40),
    )
    save_gpt2(model, tmp_path / "a")
    again = load_gpt2(tmp_path / "a")
    assert again.config == model.config
    assert again.head.weight is again.token.weight
    for (name, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    save_gpt2(again, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_reading_leaves_the_random_numbers_alone(folder):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    load_gpt2(folder)
    assert torch.equal(torch.rand(2), want)


# -- layouts -----------------------------------------------------------------------------------


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def test_every_layout_of_names_gives_the_same_model(folder):
    """Without prefix, with the masks of old files, with the tied head written out, in 16 bits."""
    want = load_gpt2(folder)
    rewrite(folder, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    agree(load_gpt2(folder), want, atol=0)
    masks = {
        "h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(),
        "h.2.attn.bias": torch.ones(1, 1, 12, 12, dtype=torch.uint8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    rewrite(folder, lambda t: {**t, **masks, "lm_head.weight": t["wte.weight"].clone()})
    agree(load_gpt2(folder), want, atol=0)
    rewrite(folder, lambda t: {k: v.bfloat16() for k, v in t.items()})
    half = load_gpt2(folder)
    assert half.token.weight.dtype == torch.float32
    assert torch.equal(half.token.weight, want.token.weight.bfloat16().float())


def test_shards_are_read_together(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    agree(load_gpt2(tmp_path / "hf"), model)
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    shard.rename(tmp_path / "kept")
    message = refused(load_gpt2, tmp_path / "hf")
    assert message.endswith(f"{shard.name} is missing; model.safetensors.index.json lists it")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    facts["weight_map"]["transformer.wte.weight"] = "../kept"
    index.write_text(json.dumps(facts))
    assert "lists '../kept', which is not a file beside it" in refused(load_gpt2, tmp_path / "hf")
    index.write_text("[]")
    assert "has no weight_map" in refused(load_gpt2, tmp_path / "hf")


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model_type", "llama", "model_type='llama' is not supported (only 'gpt2')"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon=1e-06 is not supported (only 1e-05)"),
        ("scale_attn_weights", False, "scale_attn_weights=False is not supported (only True)"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True is not"),
        ("add_cross_attention", True, "add_cross_attention=True is not supported (only False)"),
        ("activation_function", "gelu_ne", "unknown activation_function 'gelu_ne'; did you mean"),
        ("n_head", 5, "heads 5 does not divide dim 16"),
        ("n_layer", "3", "n_layer must be a whole number of at least 1"),
        ("n_inner", 0, "n_inner must be null or a whole number"),
        ("resid_pdrop", 1.5, "dropout 1.5 must be at least 0 and less than 1"),
        ("attn_pdrop", "x", "attn_pdrop must be a number"),
    ],
)
def test_options_that_we_lack_are_named(folder, option, value, message):
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {option: value}))
    text = refused(load_gpt2, folder)
    assert text.startswith(str(folder / "config.json"))
    assert message in text


def drop(tensors):
    tensors.pop("transformer.h.1.attn.c_attn.bias")
    tensors.pop("transformer.ln_f.weight")
    return tensors


def test_all_that_does_not_fit_is_listed(folder):
    rewrite(folder, drop)
    rewrite(folder, lambda t: {**t, "score.weight": torch.zeros(2), "h.3.ln_1.bias": torch.ones(2)})
    swapped = "transformer.h.0.mlp.c_fc.weight"
    rewrite(folder, lambda t: {**t, swapped: t[swapped].T.contiguous()})
    number = "transformer.wpe.weight"
    rewrite(folder, lambda t: {**t, number: t[number].to(torch.int8)})
    assert refused(load_gpt2, folder) == (
        f"the weights in {folder} do not fit its config.json: missing: h.1.attn.c_attn.bias, "
        "ln_f.weight; unknown: h.3.ln_1.bias, score.weight; unfit: h.0.mlp.c_fc.weight (64, 16), "
        "expected (16, 64), wpe.weight of torch.int8, expected floating point"
    )


def test_long_lists_are_cut(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if ".h." not in k})
    assert re.search(r"missing: (\S+, ){5}\S+ and 30 more$", refused(load_gpt2, folder))


def test_a_tied_head_of_its_own_is_refused(folder):
    rewrite(folder, lambda t: {**t, "lm_head.weight": torch.zeros(37, 16)})
    assert "lm_head.weight is not wte.weight, but config.json ties them" in refused(
        load_gpt2, folder
    )


def test_folders_without_whole_weights_are_refused(tmp_path, folder):
    assert refused(load_gpt2, tmp_path / "none").startswith("no folder ")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(load_gpt2, tmp_path / "empty")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "is not a whole safetensors file" in refused(load_gpt2, folder)
    path.unlink()
    assert "holds no model.safetensors" in refused(load_gpt2, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02never opened")
    assert "holds pickled weights (.bin), which are never opened" in refused(load_gpt2, folder)
    (folder / "config.json").write_text("[]")
    assert "is not the config of a model" in refused(load_gpt2, folder)
    (folder / "config.json").write_text("{}")
    assert "does not say its model_type" in refused(load_gpt2, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wiring": "postnorm"}, "wiring 'postnorm' (allowed: 'prenorm')"),
        ({"norm": "rmsnorm"}, "norm 'rmsnorm' (allowed: 'layernorm')"),
        ({"parallel": True}, "parallel True (allowed: False)"),
        ({"head_bias": True, "tied": False}, "head_bias True (allowed: False)"),
        ({"embedding": EmbeddingConfig(positions="rotary")}, "positions 'rotary' (allowed: 'learn"),
        (
            {"attention": AttentionConfig(kv_heads=2, qk_norm=True)},
            "kv_heads 2 (allowed: 0), qk_norm True (allowed: False)",
        ),
        (
            {"feedforward": FeedForwardConfig(activation="swiglu", feedforward_bias=False)},
            "activation 'swiglu' (allowed: gelu gelu-tanh relu relu2 sigmoid silu tanh), "
            "feedforward_bias False (allowed: True)",
        ),
    ],
)
def test_what_gpt2_cannot_express_is_named(tmp_path, changes, message):
    text = refused(save_gpt2, ours(**changes), tmp_path / "out")
    assert text.startswith("GPT-2 cannot express ")
    assert message in text
    assert not (tmp_path / "out").exists()


def test_no_folder_is_overwritten_and_none_is_left_half_written(tmp_path, monkeypatch):
    model = ours()
    (tmp_path / "out").mkdir()
    save_gpt2(model, tmp_path / "out")  # an empty folder is fine
    assert "exists and is not empty" in refused(save_gpt2, model, tmp_path / "out")
    (tmp_path / "file").write_bytes(b"")
    assert "exists and is not empty" in refused(save_gpt2, model, tmp_path / "file")
    other = NGPT(NGPTConfig(vocab_size=5))
    assert "NGPT is not a GPT" in refused(save_gpt2, other, tmp_path / "ngpt")

    def full(*args):
        raise OSError("No space left")

    monkeypatch.setattr("addnorm.interop.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_gpt2(model, tmp_path / "torn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
