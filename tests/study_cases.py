"""Made-up studies for the tests: every kind of plot and rule, failures, odd names."""

import math

import numpy as np
from study_rows import concluded

from addnorm.studies.frame import (
    Claim,
    Contrast,
    Metric,
    Mode,
    Plot,
    Published,
    Study,
    Words,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"


def words(en, zh=""):
    return Words(en, zh or f"中文：{en}")


def made_up(**changes):
    """A study over nets, depths and a width, with plots of every kind; nothing is trained."""
    given = {
        "id": "ST-90",
        "name": "made-up",
        "title": words("Made up"),
        "question": words("Is deep worse than shallow?"),
        "design": words("Networks of several depths."),
        "controls": words("All else is equal."),
        "lesson": words("Made-up numbers teach nothing."),
        "claims": (
            Claim("1.3", "001", 9, words("Deep plain networks are worse.")),
            Claim("0.13", "000", 80, words("Depth alone decides."), by="same", stands=False),
        ),
        "factors": {"net": ("plain", "residual"), "depth": (4, 16, 64), "width": (32, 128)},
        "measure": measure,
        "metrics": {
            "loss": Metric(words("training loss"), words("nats"), 2.3),
            "curve": Metric(words("loss over steps"), words("nats")),
            "step": Metric(words("step")),
            "steps": Metric(words("steps to a loss of 1")),
        },
        "primary": Contrast(
            words("Deep plain networks have a higher loss than shallow ones, by 0.5 nats."),
            lambda rows: (
                rows.value("loss", net="plain", depth=64, width=32)
                - rows.value("loss", net="plain", depth=4, width=32)
            ),
            limit=0.5,
            unit=words("nats"),
        ),
        "secondary": (
            Contrast(
                words("The width makes no difference."),
                lambda rows: (
                    rows.value("loss", net="residual", depth=4, width=32)
                    - rows.value("loss", net="residual", depth=4, width=128)
                ),
                limit=0.2,
                rule="within",
                name="same",
            ),
            Contrast(
                words("Nothing is nothing."), lambda rows: 0.0, 0.0, rule="exact", name="zero"
            ),
            Contrast(
                words("Residual networks lose less than 0.1 nats."),
                lambda rows: rows.value("loss", net="residual", depth=64, width=32),
                0.1,
                rule="below",
                name="low",
            ),
        ),
        "modes": {"quick": Mode(6, 1), "default": Mode(8, 2, settings={"steps": 20})},
        "plots": (
            Plot(
                "lines", words("Loss by depth"), x="depth", y="loss", color="net", log_x=True,
                log_y=True, reference=2.3, reference_title=words("guessing"), only={"width": 32},
            ),
            Plot("dots", words("Loss by net"), x="net", y="loss", color="depth", facet="width"),
            Plot(
                "profile", words("Curves"), x="step", y="curve", color="net", facet="depth",
                only={"width": 32},
            ),
            Plot("dots", words("Steps needed"), x="depth", y="steps", color="net"),
            Plot("dots", words("No such width"), x="depth", y="loss", only={"width": 7}),
        ),
        "published": (Published(words("The same, larger"), "8.75 %", "Nobody 2015, Table 6"),),
    }  # fmt: skip
    return Study(**(given | changes))


def measure(cell):
    """Make up the metrics of a cell; the deepest plain network fails for one seed."""
    noise = np.random.default_rng((cell["seed"], cell["depth"], cell["width"])).normal()
    deep = math.log2(cell["depth"])
    loss = (0.05 * deep**2 if cell["net"] == "plain" else 0.02) * math.exp(0.1 * noise)
    if cell["net"] == "plain" and cell["depth"] == 64 and cell["seed"] == 3:
        return {"loss": math.nan, "curve": [2.3, 4.0, None], "step": [0, 10, 20], "steps": None}
    curve = [loss + 2 * math.exp(-i / 3) for i in range(11)]
    return {"loss": loss, "curve": curve, "step": [2 * i for i in range(11)], "steps": 3 + deep}


def result_of(study, metrics_of=measure):
    """The result of a study as its file holds it."""
    return concluded(study, metrics_of)
