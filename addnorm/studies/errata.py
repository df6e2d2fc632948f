"""The errata of the five documents: what is wrong in them, what is right, and what proves it.

`errata.toml` holds them; a check of a second (`checks`), the verdict of a study, a citation
or the text itself decides each.
"""

from __future__ import annotations

import functools
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from addnorm.studies import all_studies
from addnorm.studies.checks import CHECKS, prove
from addnorm.studies.frame import Words

Severity = Literal["A", "B", "C", "D"]
Kind = Literal["run", "study", "citation", "text"]
DOCUMENTS = ("000", "001", "002", "003", "004")
STATUS = {"REFUTED": "holds", "SUPPORTED": "fails", "INCONCLUSIVE": "inconclusive"}
ANSWERS = {
    "REFUTED": Words("refuted", "被否定"),
    "SUPPORTED": Words("supported", "得到支持"),
    "INCONCLUSIVE": Words("inconclusive", "不能断定"),
}
NOT_RUN = Words("not run yet", "尚未运行")


@dataclass(frozen=True)
class Erratum:
    """Something that is wrong in a document."""

    id: str
    """ "E01" to "E47" """
    severity: Severity
    """A: a reader would act on it; B: code; C: a number, label or attribution; D: wording"""
    document: str
    """the document, "000" to "004" """
    lines: tuple[str, ...]
    """where it stands, "33" or "58-61", the main place first"""
    says: Words
    """what the document says, in our words"""
    right: Words
    proof: Kind
    also: tuple[str, ...] = ()
    """the same error in other documents, "004:9" """
    check: str = ""
    """the function of `checks` that decides, where the proof is run"""
    study: str = ""
    """ "ST-04": decides where the proof is study, and is further evidence elsewhere"""
    claim: str = ""
    """number of the claim that comes out REFUTED there, "1.10" """
    source: tuple[str, ...] = ()
    """keys of the bibliography"""

    @property
    def line(self) -> int:
        """The first line of the main place."""
        return int(self.lines[0].partition("-")[0])


def load_errata(path: Path | None = None) -> list[Erratum]:
    """Return the errata in the order of documents and lines.

    `path`: another file than the package's own. Raises `ValueError` for one that is not whole: an
    id twice, an unknown severity, document, kind of proof or check, a proof without what it needs.
    """
    text = path.read_text("utf-8") if path else _text("errata.toml")
    found = [_erratum(entry) for entry in tomllib.loads(text).get("erratum", [])]
    ids = [e.id for e in found]
    for name in ids:
        if ids.count(name) > 1:
            raise ValueError(f"{name}: stands twice")
    return sorted(found, key=lambda e: (e.document, e.line, e.id))


def _erratum(entry: Mapping[str, Any]) -> Erratum:
    """Read one entry, and see that it has what its kind of proof asks for."""
    given = dict(entry)
    name = given.get("id", "an erratum without id")
    missing = {"severity", "document", "lines", "says", "right", "proof"} - given.keys()
    strange = given.keys() - Erratum.__dataclass_fields__.keys()
    if missing or strange:
        what = "lacks" if missing else "has the unknown"
        raise ValueError(f"{name}: {what} {', '.join(sorted(missing or strange))}")
    for field in ("says", "right"):
        if set(given[field]) != {"en", "zh"}:
            raise ValueError(f"{name}: {field} needs en and zh")
        given[field] = Words(**given[field])
    given["lines"] = tuple(map(str, given["lines"]))
    for field in ("also", "source"):
        given[field] = tuple(given.get(field, ()))
    erratum = Erratum(**given)
    for value, known in (
        (erratum.severity, get_args(Severity)),
        (erratum.document, DOCUMENTS),
        (erratum.proof, get_args(Kind)),
    ):
        if value not in known:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")
    places = [*(f"{erratum.document}:{at}" for at in erratum.lines), *erratum.also]
    for place in places:
        if not re.fullmatch(r"00[0-4]:[1-9]\d*(-[1-9]\d*)?", place):
            raise ValueError(f"{name}: {place!r} is not a document and a line, such as 004:9")
    needs = {
        "run": erratum.check in CHECKS,
        "study": bool(erratum.study),
        "citation": bool(erratum.source),
        "text": True,
    }
    if not erratum.lines or not needs[erratum.proof]:
        raise ValueError(f"{name}: a proof of kind {erratum.proof} needs its lines and its proof")
    if bool(erratum.study) != bool(erratum.claim):
        raise ValueError(f"{name}: study and claim belong together")
    return erratum


def check_errata(
    verdicts: Mapping[tuple[str, str], str], errata: Sequence[Erratum] | None = None
) -> list[dict[str, Any]]:
    """Return every erratum with how its proof came out, as plain values.

    `verdicts[(study, claim)]`: SUPPORTED, REFUTED or INCONCLUSIVE, such as ("ST-04", "1.10").
    `status` is `holds`, `fails`, `inconclusive` or `not run`: an erratum of kind study holds where
    its claim is REFUTED and is not run where its verdict is unknown, a citation holds where the
    bibliography has every source, text holds by itself. `evidence` says it in both languages.
    """
    return [_row(e, verdicts) for e in (load_errata() if errata is None else errata)]


def _row(erratum: Erratum, verdicts: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    status, evidence = _outcome(erratum, verdicts)
    known = bibliography()
    return {
        "id": erratum.id,
        "severity": erratum.severity,
        "document": erratum.document,
        "line": erratum.line,
        "lines": list(erratum.lines),
        "also": list(erratum.also),
        "says": erratum.says._asdict(),
        "right": erratum.right._asdict(),
        "proof": erratum.proof,
        "check": erratum.check,
        "study": erratum.study,
        "claim": erratum.claim,
        "sources": [known.get(key, key) for key in erratum.source],
        "status": status,
        "evidence": evidence._asdict(),
    }


def _outcome(erratum: Erratum, verdicts: Mapping[tuple[str, str], str]) -> tuple[str, Words]:
    """Return the status and what is said for it."""
    verdict = verdicts.get((erratum.study, erratum.claim), "")
    answer = ANSWERS[verdict] if verdict else NOT_RUN
    where = _answered(erratum) if erratum.study else ("", "")
    studied = Words(
        f"Study {erratum.study} ({where[0]}), the claim at {where[1]}: {answer.en}.",
        f"实验 {erratum.study}（{where[0]}），{where[1]} 的论断：{answer.zh}。",
    )
    if erratum.proof == "run":
        proof = prove(erratum.check)
        told = _joined(proof.evidence, studied) if verdict else proof.evidence
        return "holds" if proof.holds else "fails", told
    if erratum.proof == "study":
        return STATUS.get(verdict, "not run"), studied
    if erratum.proof == "citation":
        absent = [key for key in erratum.source if key not in bibliography()]
        if absent:
            listed = ", ".join(absent)
            return "fails", Words(
                f"Not in the bibliography: {listed}.", f"文献表中没有：{listed}。"
            )
        told = Words("As the sources say.", "依据所引文献。")
        return "holds", _joined(told, studied) if verdict else told
    return "holds", Words("The document shows it.", "文中即可看出。")


def _answered(erratum: Erratum) -> tuple[str, str]:
    """Return the name of the study that answers the erratum's claim, and where that stands."""
    (study,) = (s for s in all_studies() if s.id == erratum.study)
    (claim,) = (c for c in study.claims if c.id == erratum.claim)
    return study.name, f"{claim.document}:{claim.line}"


def _joined(first: Words, second: Words) -> Words:
    return Words(f"{first.en} {second.en}", first.zh + second.zh)


@functools.cache
def bibliography() -> Mapping[str, str]:
    """Return by key what the package's two bibliographies cite: authors, year, title, address."""
    found = {}
    for text in (_text("references.bib", "addnorm.wirings"), _text("references.bib")):
        for entry in re.findall(r"^@\w+\{.*?^\}", text, re.M | re.S):
            fields = dict(re.findall(r"^ +(\w+) += \{(.*?)\},$", entry, re.M | re.S))
            key = entry.partition("{")[2].partition(",")[0]
            found[key] = _cited({name: _plain(value) for name, value in fields.items()})
    return found


def _cited(fields: Mapping[str, str]) -> str:
    """Write one entry as a line."""
    names = [author.split()[-1] for author in fields["author"].split(" and ")]
    authors = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    where = f"arXiv:{fields['eprint']}" if "eprint" in fields else ""
    for name in ("journal", "booktitle", "publisher", "url"):
        where = where or fields.get(name, "")
    return f"{authors} {fields['year']}, {fields['title']}, {where}"


def _plain(value: str) -> str:
    """Return a field of BibTeX as text: one line, without braces, accents as letters."""
    for accent, mark in (('\\"', "\N{COMBINING DIAERESIS}"), ("\\'", "\N{COMBINING ACUTE ACCENT}")):
        value = re.sub(rf"\{{{re.escape(accent)}(\w)\}}", rf"\1{mark}", value)
    return unicodedata.normalize("NFC", re.sub(r"[{}\\]", "", " ".join(value.split())))


def _text(name: str, package: str = "addnorm.studies") -> str:
    return resources.files(package).joinpath(name).read_text("utf-8")
