"""`watch` and `xray` under DDP and FSDP2: two real processes, gloo, against one process."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import joined, two_processes
from torch import nn

from addnorm import GPT, GPTConfig, watch, xray
from addnorm.files import write_json

VOCABULARY, CONTEXT, BATCH, STEPS = 11, 8, 6, 2
VALUES = (
    "stream_before",
    "stream_after",
    "branch_share",
    "gradient_before",
    "gradient_after",
    "token_similarity",
    "identity_gain",
    "gain_backward",
)
GAINS = ("identity_gain", "gain_backward")  # products that FSDP2 does not allow


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.lin(self.norm(x)).relu()


def make(kind):
    """Return our GPT, or a model that is not ours."""
    torch.manual_seed(0)
    if kind == "ours":
        sizes = {"depth": 2, "dim": 16, "heads": 2, "context": CONTEXT}
        return GPT(GPTConfig(**sizes, vocab_size=VOCABULARY))
    blocks = nn.Sequential(*[Block() for _ in range(3)])
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), blocks, nn.Linear(8, VOCABULARY))


def blocks_of(model):
    return list(model.stack) if isinstance(model, GPT) else list(model[1])


def batch(step):
    return torch.randint(
        VOCABULARY, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(step)
    )


def wrapped(kind, how):
    model = make(kind)
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def train(model, watched, part=slice(None)):
    """Return the losses of a plain loop on that part of every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        inputs = batch(step)[part]
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten())
        loss.backward()
        losses.append(loss.item())
        if watched is not None:
            watched.before_update()
        optimizer.step()
        if watched is not None:
            watched.after_update(loss)
        optimizer.zero_grad()
    return losses


def whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(m, name)) for m in model.modules() for name in names]


def vitals(trace):
    return [[getattr(c, name) for name in VALUES] for c in trace.connections]


def in_one_process(kind):
    """Return the rows over the whole batch."""
    rows, model = [], make(kind)
    with watch(model, 1, lambda row, step: rows.append(row), flush=1) as watched:
        train(model, watched)
    return rows


def process(rank, kind, how):
    """Do in one of two processes what the tests look at, and return it."""
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    model, plain, rows = wrapped(kind, how), wrapped(kind, how), []
    inputs = batch(9)[part]
    looked = xray(model, inputs, inputs)
    alone = xray(make(kind), inputs, inputs)
    before = hooks_of(model)
    watched = watch(model, 1, lambda row, step: rows.append(row), flush=1)
    losses = train(model, watched, part)
    watched.close()
    hooked = hooks_of(model)
    same = losses == train(plain, None, part)
    parameters = zip(model.parameters(), plain.parameters(), strict=True)
    same = same and all(torch.equal(whole(a), whole(b)) for a, b in parameters)
    return {
        "rows": rows,
        "same": same,
        "hooks": [before, hooked, hooks_of(plain)],
        "looked": vitals(looked),
        "alone": vitals(alone),
        "names": [c.name for c in looked.connections],
        "names alone": [c.name for c in alone.connections],
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two processes saw, by model, wrapper and rank."""
    folder = tmp_path_factory.mktemp("distributed")
    two_processes(__file__, folder)
    return {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}


CASES = [(kind, how) for kind in ("ours", "foreign") for how in ("ddp", "fsdp")]


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_two_processes_see_the_numbers_of_the_whole_batch(seen, kind, how):
    rows, expected = seen[f"{kind}-{how}-0"]["rows"], in_one_process(kind)
    assert len(rows) == len(expected) == STEPS
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert seen[f"{kind}-{how}-1"]["rows"] == []  # one process logs


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(("kind", "how"), CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_training_is_bitwise_the_same_watched_or_not(seen, kind, how, rank):
    found = seen[f"{kind}-{how}-{rank}"]
    assert found["same"]
    before, after, plain = found["hooks"]
    assert after == plain
    assert after == before


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(("kind", "how"), CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_x_ray_of_a_wrapped_model_is_that_of_the_model(seen, kind, how, rank):
    found = seen[f"{kind}-{how}-{rank}"]
    assert found["names"] == found["names alone"]
    for mine, other in zip(found["looked"], found["alone"], strict=True):
        for name, a, b in zip(VALUES, mine, other, strict=True):
            if how == "fsdp" and name in GAINS:
                assert a is None
            else:
                assert a == pytest.approx(b, rel=1e-4, abs=1e-7), name


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    with joined(rank, folder):
        for kind in ("ours", "foreign"):
            for how in ("ddp", "fsdp"):
                write_json(folder / f"{kind}-{how}-{rank}.json", process(rank, kind, how))
