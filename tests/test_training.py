"""The trainer: schedule, what it learns, checkpoints, kill and resume, failure."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from addnorm import GPT, GPTConfig, Runtime, TrainConfig, load_run, load_text, runs, sample, train
from addnorm.cli import main
from addnorm.files import read_json, read_lines
from addnorm.training import checkpoint
from addnorm.training.loop import Observer, make_optimizer, train_loop
from addnorm.training.objective import squared_error
from addnorm.training.tune import Choice

EAGER = Choice(threads=1)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    return str(path)


def small(text, *, seed=0, **changes):
    data = load_text(text, 16)
    torch.manual_seed(seed)
    settings = {"depth": 1, "dim": 16, "heads": 2, "context": 16} | changes
    return GPT(GPTConfig(vocab_size=data.vocab_size, **settings)), data


def curve(folder):
    rows = read_lines(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


SCHEDULES = [
    ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.775, 0.325]),
    ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.25]),
    ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES)
def test_the_rate_warms_up_linearly_and_then_decays(schedule, expected):
    config = TrainConfig(steps=12, warmup=4, schedule=schedule)
    rates = [config.rate(step) for step in (0, 1, 2, 3, 4, 6, 10)]
    if schedule == "cosine":  # a tenth is left at the end: 0.1 + 0.9 (1 + cos(pi p)) / 2
        expected = [*expected[:5], 0.1 + 0.45 * (1 + 2**-0.5), 0.1 + 0.45 * (1 - 2**-0.5)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"lr": -1.0}, "lr -1.0 must be a positive number, for instance 1e-3"),
        ({"lr": float("nan")}, "lr nan must be a positive number, for instance 1e-3"),
        ({"warmup": -1}, "warmup -1 must be at least 0"),
        ({"batch": 0}, "batch 0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainConfig(**change)


def test_training_learns_the_text_below_the_unigram_line(text):
    model, data = small(text)
    run = train(
        model, data, TrainConfig(steps=150, lr=1e-2, warmup=10, eval_every=50), choice=EAGER
    )
    assert run.status == "finished"
    assert [step for step, *_ in run.evaluations] == [0, 50, 100, 150]
    assert run.validation < data.unigram - 1
    assert len(run.losses) == 150


def test_the_first_losses_equal_a_naive_loop(text):
    """AdamW with these groups, this rate and this clipping, restated with plain tensors."""
    config = TrainConfig(steps=4, lr=1e-2, warmup=2, clip=0.5, weight_decay=0.1)
    model, data = small(text)
    run = train(model, data, config, choice=EAGER)
    naive, _ = small(text)
    parameters = list(naive.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    losses = []
    for step in range(4):
        inputs, targets = map(torch.from_numpy, data.training_batch(0, step, config.batch))
        logits = naive(inputs)
        loss = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        scale = min(1.0, 0.5 / (norm.item() + 1e-6))
        rate = config.lr * config.rate(step)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * scale
                p.mul_(1 - rate * (0.1 if p.dim() >= 2 else 0.0))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.98).add_(0.02 * g * g)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.98 ** (step + 1))
                p.sub_(rate * m_hat / (v_hat.sqrt() + 1e-8))
    assert run.losses == pytest.approx(losses, rel=1e-5)


def test_matrices_decay_and_a_wirings_own_parameters_follow_its_facts(text):
    model, _ = small(text, wiring="rezero")
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() >= 2 else 0.0), name


def test_the_same_seed_gives_bitwise_the_same_run(text, tmp_path):
    for name in ("a", "b"):
        model, data = small(text, dropout=0.1)
        train(model, data, TrainConfig(steps=20, eval_every=10), out=tmp_path / name, choice=EAGER)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_run_folder_loads_with_the_same_outputs(text, tmp_path):
    model, data = small(text, tied=True)
    run = train(model, data, TrainConfig(steps=5), out=tmp_path / "run", choice=EAGER)
    loaded = load_run(tmp_path / "run")
    tokens = torch.from_numpy(data.training_batch(0, 0, 2)[0])
    assert torch.equal(loaded.model(tokens), run.model.eval()(tokens))
    assert loaded.status == "finished"
    config = read_json(tmp_path / "run" / "config.json")
    assert config["data"]["sha256"] == data.sha256
    assert config["choice"]["precision"] == "float32"


def test_a_folder_that_holds_a_run_is_not_written_over(text, tmp_path):
    model, data = small(text)
    train(model, data, TrainConfig(steps=2), out=tmp_path / "run", choice=EAGER)
    with pytest.raises(ValueError, match="holds a run already; go on with --resume"):
        train(model, data, TrainConfig(steps=2), out=tmp_path / "run", choice=EAGER)


class Poisoned(nn.Module):
    """A net of two blocks whose second one is fed NaN from the fifth training call on."""

    def __init__(self, vocab_size):
        super().__init__()
        self.token = nn.Embedding(vocab_size, 8)
        layer = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
        self.blocks = nn.ModuleList(layer)
        self.head = nn.Linear(8, vocab_size)
        self.calls = 0

    def forward(self, tokens):
        self.calls += self.training
        x = self.blocks[0](self.token(tokens))
        x = self.blocks[1](x * (float("nan") if self.calls > 4 else 1.0))
        return self.head(x)


def test_a_nan_loss_stops_keeps_the_last_checkpoint_and_names_the_block(text, tmp_path):
    data = load_text(text, 16)
    torch.manual_seed(0)
    model = Poisoned(data.vocab_size)
    config = TrainConfig(steps=50, eval_every=2)
    run = train(model, data, config, out=tmp_path / "run", choice=EAGER)
    assert run.status == "diverged"
    assert run.step < 5
    _, facts = checkpoint.load_file(tmp_path / "run" / "checkpoint.safetensors")
    tensors, _ = checkpoint.load_file(tmp_path / "run" / "model.safetensors")
    assert facts["step"] == 4
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "diverged"
    assert "First bad block:" in runs.describe_outcome(run)


# -- weights files -----------------------------------------------------------------------------


def test_a_truncated_a_pickled_and_a_foreign_weights_file_are_refused(text, tmp_path):
    model, data = small(text)
    train(model, data, TrainConfig(steps=2), out=tmp_path / "run", choice=EAGER)
    path = tmp_path / "run" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_run(tmp_path / "run")
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="pickled weights are never opened"):
        load_run(tmp_path / "run")
    checkpoint.save_file(path, {"other": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="does not belong to this model: it lacks"):
        load_run(tmp_path / "run")
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_run(tmp_path / "run")


def test_a_changed_corpus_is_noticed(text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(Path(text).read_text(encoding="utf-8"), encoding="utf-8")
    model, data = small(str(own))
    train(model, data, TrainConfig(steps=2), out=tmp_path / "run", choice=EAGER)
    own.write_text(own.read_text(encoding="utf-8")[:-1] + "!", encoding="utf-8")
    with pytest.raises(ValueError, match="are not those of this run or comparison: their sha256"):
        load_run(tmp_path / "run")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    checkpoint.save_file(path, {"a": torch.ones(3)}, {"step": 1})
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_file(path, {"a": torch.zeros(3)}, {"step": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


# -- sampling ----------------------------------------------------------------------------------


def test_sampling_is_reproducible_and_follows_its_settings(text, tmp_path):
    model, data = small(text)
    run = train(model, data, TrainConfig(steps=100, lr=1e-2, warmup=5), choice=EAGER)
    greedy = sample(run, "the ", tokens=40, temperature=0)
    assert greedy == sample(run, "the ", tokens=40, temperature=0, seed=9)
    assert greedy == sample(run, "the ", tokens=40, top_k=1, seed=3)
    assert len(greedy) == 44
    assert sample(run, "the ", tokens=40, seed=1) == sample(run, "the ", tokens=40, seed=1)
    assert sample(run, "the ", tokens=40, seed=1) != sample(run, "the ", tokens=40, seed=2)


def test_several_prompts_give_what_each_gives_alone_and_streaming_gives_the_same(text):
    model, data = small(text)
    run = train(model, data, TrainConfig(steps=20, lr=1e-2, warmup=5), choice=EAGER)
    prompts = ["the ", "a", "the "]
    texts = sample(run, prompts, tokens=30, top_k=9, top_p=0.9, seed=4)
    assert texts == [
        sample(run, p, tokens=30, top_k=9, top_p=0.9, seed=4 + i) for i, p in enumerate(prompts)
    ]
    for i, (prompt, whole) in enumerate(zip(prompts, texts, strict=True)):
        streamed = list(runs.stream(run, prompt, tokens=30, top_k=9, top_p=0.9, seed=4 + i))
        assert len(streamed) == 30
        assert prompt + "".join(streamed) == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "the €"}, "the character '€'"),
        ({"tokens": 0}, "tokens 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature -1.0 must be at least 0"),
        ({"top_k": -1}, "top_k -1 must be at least 0"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"prompt": ["the", ""]}, "prompt 2 of 2 is empty"),
        ({"prompt": []}, "there is no prompt"),
    ],
)
def test_bad_sampling_settings_are_refused(text, settings, message):
    model, data = small(text)
    run = train(model, data, TrainConfig(steps=1), choice=EAGER)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        sample(run, **({"prompt": "the"} | settings))


# -- the user's own model ----------------------------------------------------------------------

OWN = """
from torch import nn

def make(vocab_size):
    return nn.Sequential(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))

def wrong(vocab_size, context):
    return nn.Embedding(vocab_size, 3)

def none():
    return "no module"
"""


def test_a_users_own_model_trains_resumes_and_samples(text, tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    target = f"{tmp_path / 'own.py'}:make"
    data = load_text(text, 16)
    model = runs.build_model({"function": target}, data)
    described = {"function": target}
    config = TrainConfig(steps=60, lr=3e-2, warmup=5)
    run = train(model, data, config, out=tmp_path / "run", choice=EAGER, description=described)
    assert run.validation < data.unigram
    assert len(sample(load_run(tmp_path / "run"), "the ", tokens=5)) == 9
    wrong = runs.build_model({"function": f"{tmp_path / 'own.py'}:wrong"}, data)
    with pytest.raises(ValueError, match=r"Embedding returns \(2, 16, 3\) .* needs logits"):
        train(wrong, data, config, choice=EAGER)
    with pytest.raises(ValueError, match=r"returned str, not a torch\.nn\.Module"):
        runs.build_model({"function": f"{tmp_path / 'own.py'}:none"}, data)
    with pytest.raises(ValueError, match="has no function 'mak'; did you mean 'make'"):
        runs.build_model({"function": f"{tmp_path / 'own.py'}:mak"}, data)


# Sixteen sigmoid layers without a skip connection: the gradient vanishes.
SICK = """
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(x).sigmoid()

class Net(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token = nn.Embedding(vocab_size, 8)
        self.layers = nn.Sequential(*[Layer() for _ in range(16)])
        self.head = nn.Linear(8, vocab_size)

    def forward(self, tokens):
        return self.head(self.layers(self.token(tokens)))

def make(vocab_size):
    return Net(vocab_size)
"""


# -- kill and resume ---------------------------------------------------------------------------

# A training in a process of its own. With `KILL_AT_WRITE=n` it kills itself with SIGKILL in the
# middle of the n-th checkpoint write, after half of the bytes.
TRAINING = """
import os, signal, sys, torch
from addnorm import GPT, GPTConfig, TrainConfig, load_text, train
from addnorm.training.tune import Choice
from addnorm.training import checkpoint
text, out, seed, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
kill_at = int(os.environ.get("KILL_AT_WRITE", "0"))
if kill_at:
    whole, count = checkpoint.save, [0]
    def save(*args):
        data = whole(*args)
        count[0] += 1
        if count[0] == kill_at:
            class Half(bytes):
                pass
            open_write = checkpoint.write_atomic
            import contextlib
            @contextlib.contextmanager
            def torn(path):
                with open_write(path) as file:
                    class File:
                        def write(self, data):
                            file.write(data[: len(data) // 2])
                            file.flush()
                            os.kill(os.getpid(), signal.SIGKILL)
                    yield File()
            checkpoint.write_atomic = torn
        return data
    checkpoint.save = save
data = load_text(text, 16)
torch.manual_seed(seed)
sizes = dict(depth=1, dim=16, heads=2, context=16, vocab_size=data.vocab_size)
model = GPT(GPTConfig(dropout=0.1, **sizes))
config = TrainConfig(steps=steps, eval_every=7, eval_batches=2, seed=seed)
train(model, data, config, out=out, choice=Choice(threads=1))
"""
STEPS = 150


def run_python(code, *arguments, **environment):
    env = os.environ | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_at_random_steps_resumes_bitwise(text, tmp_path, seed):
    """SIGKILL at three random steps; the resumed curve equals the uninterrupted one bit by bit."""
    model, data = small(text, seed=seed, dropout=0.1)
    config = TrainConfig(steps=STEPS, eval_every=7, eval_batches=2, seed=seed)
    torch.set_num_threads(1)
    train(model, data, config, out=tmp_path / "whole", choice=EAGER)
    draw = random.Random(seed)
    folder = tmp_path / "killed"
    process = run_python(TRAINING, text, folder, seed, STEPS)
    for _ in range(2):
        wait_for_step(process, folder, draw.randrange(8, STEPS - 60))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        process = run_python(
            "import sys, torch; torch.set_num_threads(1)\n"
            "from addnorm import runs; runs.resume(sys.argv[1])",
            folder,
        )
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert curve(folder) == curve(tmp_path / "whole")
    same = [checkpoint.load_file(p / "model.safetensors")[0] for p in (folder, tmp_path / "whole")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[1])


def wait_for_step(process, folder, step):
    """Wait until the metrics hold `step`, or the process has ended."""
    while process.poll() is None:
        rows = curve(folder) if (folder / "metrics.jsonl").exists() else []
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_while_it_writes_a_checkpoint_resumes_bitwise(text, tmp_path, seed):
    """Two files are written at each checkpoint; the kill tears one of them at half of its bytes."""
    torch.set_num_threads(1)
    model, data = small(text, seed=seed, dropout=0.1)
    config = TrainConfig(steps=STEPS, eval_every=7, eval_batches=2, seed=seed)
    train(model, data, config, out=tmp_path / "whole", choice=EAGER)
    folder = tmp_path / "killed"
    process = run_python(TRAINING, text, folder, seed, STEPS, KILL_AT_WRITE=str(5 + seed))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert any(p.name.startswith(".") and "safetensors" in p.name for p in folder.iterdir())
    checkpoint.load_file(folder / "checkpoint.safetensors")
    runs.resume(folder)
    assert curve(folder) == curve(tmp_path / "whole")


def test_ctrl_c_saves_and_resume_goes_on_bitwise(text, tmp_path):
    torch.set_num_threads(1)
    model, data = small(text, dropout=0.1)
    config = TrainConfig(steps=400, eval_every=50, eval_batches=2)
    train(model, data, config, out=tmp_path / "whole", choice=EAGER)
    folder = tmp_path / "stopped"
    code = TRAINING.replace("eval_every=7", "eval_every=50")
    process = run_python(code, text, folder, 0, 400)
    wait_for_step(process, folder, 50)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert read_json(folder / "summary.json")["status"] == "interrupted"
    runs.resume(folder)
    assert curve(folder) == curve(tmp_path / "whole")
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_a_second_process_in_the_same_folder_is_refused(text, tmp_path):
    folder = tmp_path / "run"
    process = run_python(TRAINING, text, folder, 0, 5000)
    wait_for_step(process, folder, 1)
    model, data = small(text)
    try:
        with pytest.raises(ValueError, match="another process is writing to"):
            train(model, data, TrainConfig(steps=1), out=folder, choice=EAGER)
        with pytest.raises(ValueError, match="another process is writing to"):
            runs.resume(folder)
    finally:
        process.kill()
        process.communicate()


# -- the watched run ---------------------------------------------------------------------------


class Heard(Observer):
    """Keeps what is said; stops the run as Ctrl-C does after `stop` steps."""

    def __init__(self, stop=0):
        self.said, self.stop = [], stop

    def say(self, message):
        self.said.append(message)

    def step(self, step, *_):
        if step == self.stop:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("every", [1, 4])
def test_the_curve_is_bitwise_the_same_watched_or_not_and_the_rows_are_kept(text, tmp_path, every):
    config = TrainConfig(steps=9, warmup=2, eval_every=5, eval_batches=2)
    for watched in (0, every):
        model, data = small(text, dropout=0.1)
        runtime = Runtime(watch=watched)
        train(model, data, config, runtime, out=tmp_path / str(watched), choice=EAGER)
    assert curve(tmp_path / "0") == curve(tmp_path / str(every))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("0", str(every))]
    assert weights[0] == weights[1]
    assert not (tmp_path / "0" / "watch.jsonl").exists()
    rows = read_lines(tmp_path / str(every) / "watch.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10, every))
    losses = {row["step"]: row["loss"] for row in curve(tmp_path / "0") if "loss" in row}
    for row in rows:
        assert row["loss"] == pytest.approx(losses[row["step"]])
        assert row["stream/layer_0.1/rms_after"] > 0
    assert 0 < rows[0]["parameters/layer_0.0/update_ratio"] < 1
    assert 0 < rows[0]["parameters/gradient_norm"] <= config.clip + 1e-5


@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_run_has_the_watch_rows_of_one_that_was_never_stopped(text, tmp_path, every):
    config = TrainConfig(steps=20, warmup=2, eval_every=7, eval_batches=2)
    for name, stop in (("whole", 0), ("run", 9)):
        model, data = small(text, dropout=0.1)
        out, runtime = tmp_path / name, Runtime(watch=every)
        with contextlib.suppress(KeyboardInterrupt):
            train(model, data, config, runtime, out=out, observer=Heard(stop), choice=EAGER)
    folder = tmp_path / "run"
    assert read_json(folder / "summary.json")["step"] == 10
    with open(folder / "watch.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 13, "loss": 1.0}\n{"step": 17, "los')  # past the checkpoint, and torn
    runs.resume(folder)
    whole, resumed = (read_lines(tmp_path / n / "watch.jsonl") for n in ("whole", "run"))
    assert [row["step"] for row in resumed] == list(range(1, 21, every))
    assert resumed == whole


def test_a_run_that_turns_sick_says_so_while_it_runs(text, tmp_path):
    data = load_text(text, 16)
    torch.manual_seed(0)
    heard, config = Heard(), TrainConfig(steps=9, warmup=0, eval_every=5, eval_batches=1)
    run = train(
        Poisoned(data.vocab_size),
        data,
        config,
        Runtime(watch=1),
        out=tmp_path / "run",
        observer=heard,
        choice=EAGER,
    )
    assert run.status == "diverged"
    (line,) = [said for said in heard.said if "sick" in said]
    assert line.startswith("step 5: sick: non-finite at blocks.1: NaN or infinity, expected finite")
    assert "Lower the learning rate, clip the gradient" in line
    last = read_lines(tmp_path / "run" / "watch.jsonl")[-1]
    assert (last["step"], last["finding/non-finite"]) == (5, 2)
    with pytest.warns(UserWarning, match="step 5: sick: non-finite at blocks"):  # nobody listens
        train(Poisoned(data.vocab_size), data, config, Runtime(watch=1), choice=EAGER)


def test_a_model_without_blocks_trains_unwatched_and_says_why(text, tmp_path):
    data = load_text(text, 16)
    model = nn.Sequential(nn.Embedding(data.vocab_size, 8), nn.Linear(8, data.vocab_size))
    heard = Heard()
    train(model, data, TrainConfig(steps=2), out=tmp_path / "run", observer=heard, choice=EAGER)
    assert "not watched: Sequential has no module that is a wiring or repeats" in heard.said[-1]
    assert not (tmp_path / "run" / "watch.jsonl").exists()


def test_the_command_line_prints_the_finding_on_stderr(text, tmp_path, capsys):
    (tmp_path / "own.py").write_text(SICK, encoding="utf-8")
    argv = f"train --model {tmp_path / 'own.py'}:make --data {text} --out {tmp_path / 'run'}"
    settings = "--steps 6 --context 16 --device cpu --compile off --threads 1 --watch 1"
    assert main([*argv.split(), *settings.split()]) == 0
    out, err = capsys.readouterr()
    assert "step 1: sick: vanishing-gradient at layers.0: gradient RMS" in err
    assert "Keep an identity path" in err
    assert "sick" not in out


def test_a_watch_of_less_than_no_steps_is_refused():
    with pytest.raises(ValueError, match=r"^watch -1 must be at least 0$"):
        Runtime(watch=-1)


def test_the_loop_minimises_the_objective_it_is_given():
    """Least squares by gradient descent: losses and evaluation are those of the plain loop."""

    class Line:
        unit = "examples"
        x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]

        def training_batch(self, seed, step, size):
            return self.x, 3 * self.x + 1

        def validation_batches(self, size, batches):
            yield self.x, 3 * self.x + 1

    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    weight, bias = (p.detach().clone().requires_grad_() for p in model.parameters())
    rate, expected = 0.1, []
    x, y = map(torch.from_numpy, Line().training_batch(0, 0, 0))
    for _ in range(5):
        loss = (x * weight + bias - y).square().mean()
        expected.append(loss.item())
        for p, g in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            p.data -= rate * g
    plain = {"optimizer": "sgd", "betas": (0.0, 0.9), "weight_decay": 0.0, "schedule": "constant"}
    config = TrainConfig(steps=5, lr=rate, warmup=0, clip=0.0, **plain)
    runtime = Runtime(device="cpu", watch=0)
    run = train_loop(model, Line(), config, runtime, choice=EAGER, objective=squared_error)
    torch.testing.assert_close(run.losses, expected)
    final = (x * weight + bias - y).square().mean().item()
    assert run.validation == pytest.approx(final, rel=1e-5)
