"""ST-02: the verdicts both ways, and the residual removed."""

from study_rows import concluded, small, verdicts

from addnorm.contract import Stack
from addnorm.studies import st02_plus_one as module

STUDY = module.STUDY
TRUE = {
    "smallest": 0.87, "attenuated": 0.5, "identity": 0.0, "sum": 0.0, "learned": 0,
    "cancelled": 0.0, "linear": 0.0, "relu": 0.4, "tanh": 0.3, "mean": 8.0,
}  # fmt: skip


def test_it_can_say_both():
    """What bounds the Jacobian from below would refute; then no claim is called true for it."""

    def bounded(cell):
        false = {"attenuated": 0.0, "cancelled": 0.1, "relu": 0.0, "identity": 1.0, "mean": 1.0}
        return TRUE | false

    assert set(verdicts(concluded(STUDY, lambda cell: TRUE)).values()) == {"SUPPORTED", "REFUTED"}
    found = verdicts(concluded(STUDY, bounded))
    for name in ("primary", "identity", "cancels", "not-a-sum", "not-a-mean"):
        assert found[name] == "REFUTED", name
    assert (found["1.22"], found["1.23"], found["0.7"]) == ("REFUTED", *["INCONCLUSIVE"] * 2)


def test_the_skip_removed_flips_the_verdict(monkeypatch):
    """Without the skip the Jacobian is J_F alone, and the block returns F(x)."""
    study = small(STUDY, seeds=8, factors={"spread": (0.1,)})
    healthy = verdicts(concluded(study, study.measure))
    assert (healthy["primary"], healthy["identity"], healthy["sum"]) == ("SUPPORTED",) * 3

    def without(branches, wiring, **settings):
        assert wiring == "residual"
        return Stack(branches, "plain", **settings)

    monkeypatch.setattr(module, "Stack", without)
    sick = verdicts(concluded(study, study.measure))
    assert (sick["identity"], sick["sum"], sick["1.22"], sick["1.1"]) == ("REFUTED",) * 4


def test_a_jacobian_that_only_lengthens_refutes_the_statement(monkeypatch):
    """The real measure with J = 0.1 I: every direction grows, so that none shrinks."""
    study = small(STUDY, seeds=8, factors={"spread": (0.1,)})
    monkeypatch.setattr(module.torch.linalg, "svdvals", lambda m: 1.1 + 0 * m.diagonal())
    assert verdicts(concluded(study, study.measure))["primary"] == "REFUTED"
