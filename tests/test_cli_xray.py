"""`addnorm xray` and `addnorm report` on every kind of target: what is said, and the exit codes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from test_cli import refused

from addnorm import GPT, GPTConfig, save_gpt2
from addnorm.cli import main
from addnorm.probe.trace import Trace
from addnorm.targets import load_target

OWN = '''
import torch
from torch import nn
from addnorm import GPT, GPTConfig, build

def gpt(depth=2):
    torch.manual_seed(0)
    return GPT(GPTConfig(depth=depth, dim=8, heads=2, context=8, vocab_size=5))

def batch():
    return torch.arange(16).reshape(2, 8) % 5

def model():
    return gpt()

def inputs():
    return gpt(), batch()

def targets():
    return gpt(), batch(), batch()

def loss():
    return gpt(), batch(), batch(), lambda out, aim: out.square().mean() + 0 * aim.sum()

def keywords():
    return gpt(), {"tokens": batch()}

def sick():
    model, *rest = targets()
    model.head.weight.data.fill_(float("nan"))
    return model, *rest

def images():
    return build("resnet20")

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.map = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.map(self.norm(x))

class Vectors(nn.Module):
    """Takes windows of vectors only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        batch, time, width = x.shape
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

def vectors():
    return Vectors()

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 3)

    def forward(self, x):
        raise KeyError("not like this")

def picky():
    return Picky()

def nothing():
    return None

def five():
    return gpt(), 1, 2, 3, 4

def uncallable():
    return gpt(), batch(), batch(), 3

def broken():
    raise ZeroDivisionError("by design")

def needy(x):
    return x

def missing():
    import a_package_that_nobody_has
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    return tmp_path


def seen(capsys, *argv, code=0):
    """Run `addnorm xray` and return its trace."""
    assert main(["xray", *argv, "--json", "-"]) == code
    return json.loads(capsys.readouterr().out)


# -- functions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "kind", "fed"),
    [
        ("model", "random direction", "4 windows of 8 random tokens"),
        ("inputs", "random direction", "what own.py:inputs returned"),
        ("targets", "cross-entropy", "what own.py:targets returned"),
        ("loss", "the loss that was given", "what own.py:loss returned"),
        ("keywords", "random direction", "what own.py:keywords returned"),
        ("vectors", "random direction", "4 windows of 16 random vectors"),
    ],
)
def test_what_a_function_may_return(capsys, here, function, kind, fed):
    trace = seen(capsys, f"own.py:{function}")
    assert trace["loss_kind"] == kind
    assert trace["fed"] == fed
    assert len(trace["connections"]) == (3 if function == "vectors" else 4)


def test_a_model_of_images_alone_gets_images(here):
    target = load_target("own.py:images")
    assert target.inputs.shape == (4, 3, 64, 64)
    assert target.fed == "4 random images, 3 x 64 x 64"
    assert torch.equal(load_target("own.py:images").inputs, target.inputs)
    assert not torch.equal(load_target("own.py:images", seed=1).inputs, target.inputs)


REFUSED = [
    (["own.py:nothing"], "own.py:nothing must return a model, (model, inputs), (model, inputs, "
     "targets) or (model, inputs, targets, loss); got NoneType"),
    (["own.py:five"], "own.py:five must return a model, "),
    (["own.py:uncallable"], "own.py:uncallable must return a loss(output, targets) that can be"),
    (["own.py:broken"], "own.py:broken failed: ZeroDivisionError: by design ("),
    (["own.py:needy"], "own.py:needy must need no arguments: "),
    (["own.py:modle"], "own.py has no function 'modle'; did you mean 'model'?"),
    (["own.py:picky"], "own.py:picky returns a model alone, and no inputs were found for it (4 "
     "windows of 16 random vectors: KeyError: 'not like this'); return (model, inputs)"),
    (["own.py:missing"], "own.py:missing failed: ModuleNotFoundError: No module named 'a_pa"),
    (["own.py:model", "--text", "own.py"], "--text goes with a run or a Hugging Face folder"),
    (["own.py:model", "--deep", "lesions"], "unknown deeper look 'lesions'; did you mean 'lesion'"),
    (["own.py:model", "--budget", "0"], "budget 0 must be above 0 seconds"),
    (["own.py:model", "--blocks", "h.*"], "no module of GPT is named 'h.*'"),
    (["own.py:model", "--html", "page"], "the page 'page' must end in .html"),
    ([], "name a target: a run, a Hugging Face folder, or pkg.module:function"),
    (["nowhere"], "no run or Hugging Face folder 'nowhere'; give one, a saved trace, or"),
    (["nowhere.bin"], "nowhere.bin holds weights alone; give the folder with its config.json"),
    (["."], ". is not a run folder: it has no config.json"),
    (["--compare", "a.json"], "--compare takes two saved traces and no target; got 1"),
    (["--compare", "a.json", "b.json"], "no saved trace 'a.json'"),
    (["--compare", "a.json", "b.json", "--deep", "lens"], "--deep needs a model, not saved traces"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_bad_input_gets_one_line_and_exit_code_2(capsys, here, argv, message):
    assert refused(capsys, "xray", *argv).startswith(message)


# -- what comes out ----------------------------------------------------------------------------


def test_exit_code_1_when_sick_and_both_languages(capsys, here):
    assert main(["xray", "own.py:targets"]) == 0
    assert "Findings: none" in capsys.readouterr().out
    assert main(["xray", "own.py:sick"]) == 1
    text = capsys.readouterr().out
    assert "sick: non-finite, " in text
    assert main(["xray", "own.py:sick", "--lang", "zh"]) == 1
    text = capsys.readouterr().out
    assert "病态：non-finite，" in text
    assert "输入：own.py:sick 返回的输入" in text


def test_deeper_looks_reach_the_table_the_page_and_the_json(capsys, here):
    looks = "lesion,paths,landscape,lens,whiteness"
    argv = ["own.py:targets", "--deep", looks, "--budget", "3", "--html", "t.html"]
    assert main(["xray", *argv, "--json", "t.json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""  # the bar is for terminals
    for line in ("lesion: ", "paths: ", "landscape: ", "lens: ", "whiteness: "):
        assert f"\n{line}" in shown.out
    trace = Trace.load("t.json")
    assert set(trace.deep) == set(looks.split(","))
    html = Path("t.html").read_text(encoding="utf-8")
    assert all(f'id="chart-{name}"' in html for name in looks.split(","))
    assert main(["xray", "t.json"]) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["report", "t.json", "--out", "again.html"]) == 0
    assert Path("again.html").read_text(encoding="utf-8") == html
    capsys.readouterr()
    message = refused(capsys, "xray", "t.json", "--seed", "3")
    assert message == "--seed needs a model, not a saved trace"


def test_blocks_and_seed_are_used(capsys, here):
    trace = seen(capsys, "own.py:vectors", "--blocks", "blocks.[12]")
    assert [c["name"] for c in trace["connections"]] == ["blocks.1", "blocks.2"]
    a, b, c = (seen(capsys, "own.py:model", "--seed", s) for s in ("0", "0", "1"))
    assert a == b
    assert a["connections"] != c["connections"]


def test_all_shows_every_connection(capsys, here):
    deep = f"{OWN}\ndef make():\n    return gpt(40), batch()\n"
    Path("deep.py").write_text(deep, encoding="utf-8")
    assert main(["xray", "deep.py:make"]) == 0
    assert "more, --all shows them" in capsys.readouterr().out
    assert main(["xray", "deep.py:make", "--all"]) == 0
    assert "--all" not in capsys.readouterr().out


def test_two_saved_traces(capsys, here):
    seen(capsys, "own.py:targets")
    for name, code in (("targets", 0), ("sick", 1)):
        assert main(["xray", f"own.py:{name}", "--json", f"{name}.json"]) == code
    capsys.readouterr()
    argv = ["xray", "--compare", "targets.json", "sick.json"]
    assert main([*argv, "--html", "c.html"]) == 1
    assert "new sick: non-finite, " in capsys.readouterr().out
    assert 'id="chart-traces"' in Path("c.html").read_text(encoding="utf-8")
    assert main([*argv, "--lang", "zh"]) == 1
    assert "新出现 病态：non-finite，" in capsys.readouterr().out
    assert main(["xray", "--compare", "sick.json", "targets.json", "--json", "-"]) == 0
    assert [f["code"] for f in json.loads(capsys.readouterr().out)["gone"]] == ["non-finite"]


def test_a_file_that_is_no_trace(capsys, here):
    Path("t.json").write_text("{}", encoding="utf-8")
    assert refused(capsys, "xray", "t.json") == "t.json holds no trace"
    Path("t.json").write_text("{", encoding="utf-8")
    assert refused(capsys, "xray", "t.json").startswith("t.json is not JSON: ")


# -- runs --------------------------------------------------------------------------------------


def test_a_run_is_given_its_validation_batch_or_a_text(capsys, here):
    Path("text.txt").write_text("the cat sat on the mat. " * 200, encoding="utf-8")
    tiny = ["--steps", "2", "--dim", "8", "--heads", "2", "--depth", "1", "--context", "8"]
    argv = ["train", "--data", "text.txt", "--out", "run", *tiny, "--threads", "1"]
    assert main([*argv, "--warmup", "0"]) == 0
    capsys.readouterr()
    trace = seen(capsys, "run")
    assert trace["loss_kind"] == "cross-entropy"
    assert trace["fed"].startswith("12 windows of 8 tokens, validation batch of ")
    Path("other.txt").write_text("on the mat the cat sat. " * 9, encoding="utf-8")
    trace = seen(capsys, "run", "--text", "other.txt")
    assert trace["fed"] == "4 windows of 8 tokens of other.txt"
    Path("short.txt").write_text("cat", encoding="utf-8")
    message = refused(capsys, "xray", "run", "--text", "short.txt")
    assert message == "the text 'short.txt' has 3 tokens; a window needs 9"


# -- Hugging Face folders ----------------------------------------------------------------------


def tokenizer(folder, vocabulary=99):
    """A tokenizer of one token a character, in the file that Hugging Face folders have."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    known = {chr(32 + i): i for i in range(vocabulary - 1)} | {"?": vocabulary - 1}
    made = Tokenizer(models.WordLevel(known, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.save(str(folder / "tokenizer.json"))


def gpt2(folder):
    torch.manual_seed(0)
    save_gpt2(GPT(GPTConfig(depth=2, dim=8, heads=2, context=16, vocab_size=99)), folder)


def test_a_gpt2_folder_without_transformers(capsys, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    gpt2(here / "hf")
    trace = seen(capsys, "hf")
    assert trace["wiring"] == "prenorm"
    assert trace["fed"] == "4 windows of 16 random tokens: no tokenizer.json"
    assert trace["loss_kind"] == "cross-entropy"
    tokenizer(here / "hf")
    assert seen(capsys, "hf")["fed"] == "4 windows of 16 tokens of pydoc"
    config = json.loads((here / "hf" / "config.json").read_text(encoding="utf-8"))
    (here / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    message = refused(capsys, "xray", "hf")
    assert message == (
        "hf holds a model of type 'llama', which needs transformers: pip install 'addnorm[hf]' "
        "(gpt2 is read without)"
    )


def test_pickled_weights_are_refused(capsys, here):
    gpt2(here / "hf")
    (here / "hf" / "model.safetensors").rename(here / "hf" / "pytorch_model.bin")
    message = refused(capsys, "xray", "hf")
    assert message.startswith("hf holds only pytorch_model.bin, which is pickled and never opened")
    (here / "hf" / "config.json").unlink()
    message = refused(capsys, "xray", "hf")
    assert message == "hf holds pytorch_model.bin, which is pickled and never opened"
    (here / "hf" / "pytorch_model.bin").unlink()
    assert refused(capsys, "xray", "hf") == "hf is not a run folder: it has no config.json"


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
HF = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 99,
                        "n_positions": 32}, 6, "4 windows of 32 random tokens: no tokenizer.json, "
                        "as labels too", "the model's own loss"),
    "BertModel": ("BertConfig", {**TINY, "intermediate_size": 32, "vocab_size": 99}, 6,
                  "4 windows of 64 random tokens: no tokenizer.json", "random direction"),
    "ViTForImageClassification": ("ViTConfig", {**TINY, "intermediate_size": 32, "image_size": 16,
                                  "patch_size": 8}, 6, "4 random images, 3 x 16 x 16",
                                  "random direction"),
}  # fmt: skip


@needs_transformers
@pytest.mark.parametrize("kind", HF)
def test_folders_that_transformers_wrote(here, kind):
    from test_discover_zoo import load

    transformers = load("transformers")
    config, options, connections, fed, loss = HF[kind]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    model.save_pretrained(here / "hf")
    target = load_target("hf")
    assert type(target.model).__name__ == kind
    assert not target.model.training
    assert target.fed == fed
    for name, parameter in model.named_parameters():
        assert torch.equal(target.model.get_parameter(name), parameter), name
    from addnorm.probe.vitals import xray

    trace = xray(target.model, target.inputs)
    assert len(trace.connections) == connections
    assert trace.loss_kind == loss


@needs_transformers
def test_a_folder_with_a_tokenizer_reads_a_text(capsys, here):
    from test_discover_zoo import load

    load("transformers")
    gpt2(here / "hf")
    tokenizer(here / "hf")
    Path("my.txt").write_text("hello, world! " * 9, encoding="utf-8")
    target = load_target("hf", "my.txt")
    assert target.fed == "4 windows of 16 tokens of my.txt, as labels too"
    read = "".join(chr(32 + i) for i in target.inputs["input_ids"].flatten().tolist())
    assert read == ("hello, world! " * 9)[:64]
    assert torch.equal(target.inputs["labels"], target.inputs["input_ids"])
    tokenizer(here / "hf", 120)
    Path("my.txt").write_text("日", encoding="utf-8")
    message = refused(capsys, "xray", "hf", "--text", "my.txt")
    assert message.endswith("does not fit the model: token 119 of a vocabulary of 99")
    (here / "hf" / "tokenizer.json").unlink()
    message = refused(capsys, "xray", "hf", "--text", "my.txt")
    assert message == "hf has no tokenizer.json to read 'my.txt' with"


@needs_transformers
def test_weights_that_do_not_fit_are_refused(capsys, here):
    from test_discover_zoo import load

    load("transformers")
    from safetensors.torch import load_file, save_file

    gpt2(here / "hf")
    tensors = load_file(here / "hf" / "model.safetensors")
    tensors.pop("transformer.ln_f.weight")
    save_file(tensors, here / "hf" / "model.safetensors", {"format": "pt"})
    message = refused(capsys, "xray", "hf")
    assert message.startswith("transformer.ln_f.weight is missing, one of 1 tensors")
