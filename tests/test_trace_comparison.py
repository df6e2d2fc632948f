"""Two traces beside each other: who is paired with whom, which findings are gone, new or there."""

import json
import math

import pytest
import torch

from addnorm import GPT, GPTConfig, xray
from addnorm.files import finite
from addnorm.probe.trace import Connection, Finding, Trace
from addnorm.probe.trace_comparison import compare_traces


def finding(code, where="0", severity="warning"):
    return Finding(code, severity, where, "1", "0", "Why.", "Do.", "A source")


def trace(count, codes=(), model="M", wiring="", loss=1.0, **first):
    rows = []
    for i in range(count):
        facts = {
            "name": f"c{i}",
            "stream_before": i + 1.0,
            "stream_after": i + 2.0,
            "branch_share": 1.0,
            "gradient_before": 1.0,
            "gradient_after": 10.0**i,
            "token_similarity": i / 10,
            "non_finite": 0,
        }
        rows.append(Connection(**facts | (first if i == 0 else {})))
    found = tuple(c if isinstance(c, Finding) else finding(c) for c in codes)
    return Trace(model, wiring, "found", loss, "cross-entropy", tuple(rows), found)


@pytest.mark.parametrize(
    ("a", "b", "pairs"),
    [
        (4, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (3, 5, [(0, 0), (1, 2), (2, 4)]),
        (5, 3, [(0, 0), (2, 1), (4, 2)]),
        (2, 7, [(0, 0), (6 // 6, 6)]),
        (4, 8, [(0, 0), (1, 2), (2, 5), (3, 7)]),
        (1, 3, [(0, 0)]),
        (1, 1, [(0, 0)]),
    ],
)
def test_connections_are_paired_by_their_place_in_depth(a, b, pairs):
    """The ends with the ends, every one of the shorter trace with the nearest of the longer."""
    found = compare_traces(trace(a), trace(b))
    assert [(r.index_a, r.index_b) for r in found.rows] == pairs
    for row in found.rows:
        assert row.a.name == f"c{row.index_a}"
        assert row.b.name == f"c{row.index_b}"
    assert [r.place for r in found.rows] == pytest.approx(
        [k / max(1, len(pairs) - 1) for k in range(len(pairs))]
    )


@pytest.mark.parametrize("counts", [(12, 97), (56, 112), (100, 101), (7, 13)])
def test_no_connection_of_the_shorter_trace_is_left_out_or_far_away(counts):
    a, b = counts
    rows = compare_traces(trace(a), trace(b)).rows
    assert [r.index_a for r in rows] == list(range(a))
    assert [r.index_b for r in rows] == sorted({r.index_b for r in rows})
    assert rows[-1].index_b == b - 1
    for r in rows:
        assert abs(r.index_b / (b - 1) - r.index_a / (a - 1)) <= 0.5 / (b - 1) + 1e-12


def test_findings_are_gone_new_or_there_by_their_code():
    """Where they lie does not count; of those that stayed it is those of the second trace."""
    before = trace(3, [finding("x", "0"), finding("x", "1"), finding("y")])
    after = trace(3, [finding("x", "2"), finding("z", "1", "sick"), finding("z", "2")])
    found = compare_traces(before, after)
    assert [(f.code, f.where) for f in found.gone] == [("y", "0")]
    assert [(f.code, f.where) for f in found.new] == [("z", "1"), ("z", "2")]
    assert [(f.code, f.where) for f in found.stayed] == [("x", "2")]
    assert not found.ok
    back = compare_traces(after, before)
    assert [f.code for f in back.gone] == ["z", "z"]
    assert [f.code for f in back.new] == ["y"]
    assert [f.where for f in back.stayed] == ["0", "1"]
    assert back.ok  # the verdict is that of the second trace


def test_each_side_says_what_its_trace_says():
    one, two = trace(3, ["x"], "GPT", "prenorm", 2.5), trace(2, model="Other", loss=1.5)
    found = compare_traces(one, two)
    for side, whole in ((found.a, one), (found.b, two)):
        assert side.connections == len(whole.connections)
        assert (side.loss, side.loss_kind) == (whole.loss, whole.loss_kind)
        assert side.gradient_slope == whole.gradient_slope == pytest.approx(10)
        assert side.stream_growth == whole.stream_growth
        assert side.token_similarity == whole.token_similarity
        assert side.findings == whole.findings
        assert side.ok == whole.ok
    assert (found.a.label, found.b.label) == ("GPT, prenorm", "Other")


def test_of_real_models_of_two_depths_and_wirings(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 8))

    def seen(wiring, depth):
        shape = {"dim": 16, "heads": 2, "context": 8, "vocab_size": 11}
        return xray(GPT(GPTConfig(depth=depth, wiring=wiring, **shape)), tokens)

    one, two = seen("prenorm", 2), seen("postnorm", 3)
    found = one.compare(two)
    assert len(found.rows) == 4
    assert found.rows[0].b == two.connections[0]
    assert found.rows[-1].b == two.connections[-1]
    plain = found.to_dict()
    assert plain["ok"] == two.ok
    assert json.loads(json.dumps(finite(plain)))["rows"][3]["index_b"] == 5
    found.save(tmp_path / "both.json")
    written = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    assert written["a"]["label"] == "GPT, prenorm"
    assert written["b"]["connections"] == 6
    found.save(tmp_path / "both.html", "zh")
    assert "<html" in (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "postnorm" in str(found)


def test_what_was_not_measured_stays_so():
    found = compare_traces(trace(2, branch_share=math.nan), trace(2))
    assert math.isnan(found.rows[0].a.branch_share)
    assert found.rows[0].b.branch_share == 1.0
    assert finite(found.to_dict())["rows"][0]["a"]["branch_share"] is None
